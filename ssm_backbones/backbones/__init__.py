"""The backbones. Importing this package registers them in mmengine's root ``MODELS``."""

from ssm_backbones.backbones.mamba2d import Mamba2D
from ssm_backbones.backbones.v2m import V2M
from ssm_backbones.backbones.vmamba import VMamba

__all__ = ['Mamba2D', 'V2M', 'VMamba']
