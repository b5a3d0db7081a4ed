"""The version of the distribution, which holds this package and ssm_backbones."""

__version__ = '0.2.0'
