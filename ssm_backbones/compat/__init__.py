"""Patches for incompatibilities between the libraries that this package depends on.

``import ssm_backbones`` applies them, since a config's ``custom_imports`` is the earliest moment at which a plugin runs
inside mmdet's, mmseg's or mmpretrain's own tools; the command lines in ``tools/`` therefore import this package before
any host library. Nothing here imports a host library or torchvision. Each patch looks first whether it is needed, is
applied at most once in a process and is reported through the logger ``ssm_backbones.compat``.
"""

from ssm_backbones.utils.mm import INSTALLED

from .checkpoints import (
    allow_runners_in_checkpoints,
    keep_names_in_transformers,
    let_mmengine_read_weights_only,
    revise_loaded_names,
)
from .configs import allow_inheritance, find_mmseg_configs
from .half_precision import let_losses_take_bfloat16, let_mmcv_take_bfloat16
from .images import draw_in_every_process, name_unreadable_files, without_pil_limit
from .libraries import (
    accept_mmcv_2_2,
    find_torchvision_library,
    leave_out_multimodal_models,
    let_torchvision_be_imported,
)
from .model_tools import check_grad_cam_layers, within_torch_pruning

__all__ = [
    'allow_inheritance',
    'apply_patches',
    'draw_in_every_process',
    'find_torchvision_library',
    'keep_names_in_transformers',
    'let_losses_take_bfloat16',
    'let_mmcv_take_bfloat16',
    'name_unreadable_files',
    'revise_loaded_names',
    'within_torch_pruning',
    'without_pil_limit',
]


def apply_patches() -> None:
    """Apply every patch that the installed versions need. Cheap and idempotent."""
    let_torchvision_be_imported()
    allow_runners_in_checkpoints()
    if INSTALLED:
        let_mmengine_read_weights_only()
        find_mmseg_configs()
        leave_out_multimodal_models()
        check_grad_cam_layers()
        accept_mmcv_2_2()
