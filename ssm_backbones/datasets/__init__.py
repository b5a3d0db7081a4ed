"""Loading of images of many bands; and the former place of :mod:`ssm_backbones.features.dataset`."""
