"""Former place of :mod:`ssm_backbones.features.dataset`."""
