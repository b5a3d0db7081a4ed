"""State-space vision backbones for mmpretrain, mmdetection and mmsegmentation.

``custom_imports = dict(imports=['ssm_backbones'])`` in a config makes them available by ``type=``.
"""

try:
    import mmengine  # noqa: F401
except ModuleNotFoundError as error:
    raise ImportError(
        'ssm_backbones needs mmengine, and there is none: install the extra of one stack of host libraries, '
        "`pip install 'ssm-backbones[openmmlab]'` or `'ssm-backbones[onedl]'`, or mmengine alone for the backbones as "
        'plain PyTorch modules. The scans, `import cuda_ops`, need torch alone.'
    ) from error

from ssm_backbones.compat import apply_patches

# Before anything else: the patches let the host libraries import and resume.
apply_patches()

from cuda_ops import __version__  # noqa: E402
from ssm_backbones.backbones import V2M, Mamba2D, VMamba  # noqa: E402
from ssm_backbones.checkpoints import load_official  # noqa: E402
from ssm_backbones.compat import allow_inheritance  # noqa: E402
from ssm_backbones.datasets.loading import LoadBands  # noqa: E402
from ssm_backbones.engine.optim import BFloat16OptimWrapper, LayerDecayOptimWrapperConstructor  # noqa: E402
from ssm_backbones.factory import create_backbone, list_backbones  # noqa: E402
from ssm_backbones.utils.configs import config_file  # noqa: E402

allow_inheritance()

__all__ = [
    'BFloat16OptimWrapper',
    'LayerDecayOptimWrapperConstructor',
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
