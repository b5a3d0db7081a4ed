"""State-space vision backbones for mmpretrain, mmdetection and mmsegmentation.

``custom_imports = dict(imports=['ssm_backbones'])`` in a config makes them available by ``type=``.
"""

from typing import Any

from ssm_backbones.compat import apply_patches

# Before anything else: the patches let the host libraries import and resume.
apply_patches()

from cuda_ops import __version__  # noqa: E402
from ssm_backbones import pruning  # noqa: E402, F401
from ssm_backbones.backbones import V2M, Mamba2D, VMamba  # noqa: E402
from ssm_backbones.checkpoints import load_official  # noqa: E402
from ssm_backbones.compat import allow_inheritance  # noqa: E402
from ssm_backbones.datasets.loading import LoadBands  # noqa: E402
from ssm_backbones.factory import create_backbone, list_backbones  # noqa: E402
from ssm_backbones.utils import mm  # noqa: E402
from ssm_backbones.utils.configs import config_file  # noqa: E402

__all__ = [
    'LoadBands',
    'Mamba2D',
    'V2M',
    'VMamba',
    '__version__',
    'config_file',
    'create_backbone',
    'list_backbones',
    'load_official',
]
_WITH_MMENGINE = [
    'BFloat16OptimWrapper',
    'FSDP2Strategy',
    'GroupedOptimWrapperConstructor',
    'LayerDecayOptimWrapperConstructor',
]

if mm.INSTALLED:
    from ssm_backbones.engine.fsdp2 import FSDP2Strategy  # noqa: F401
    from ssm_backbones.engine.optim import (  # noqa: F401
        BFloat16OptimWrapper,
        GroupedOptimWrapperConstructor,
        LayerDecayOptimWrapperConstructor,
    )

    __all__ += _WITH_MMENGINE
    allow_inheritance()


def __getattr__(name: str) -> Any:
    if name in _WITH_MMENGINE:
        raise ImportError(f'{name} needs mmengine, which is not installed; {mm.REMEDY}')
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
