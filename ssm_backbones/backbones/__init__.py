"""The backbones. Importing this package registers them in mmengine's root ``MODELS``."""

from ssm_backbones.backbones.vmamba import VMamba

__all__ = ['VMamba']
