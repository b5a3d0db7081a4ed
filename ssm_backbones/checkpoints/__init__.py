"""Official checkpoints of the authors' own code, converted strictly to this package's names and back.

``tools/convert_checkpoint.py`` converts files; ``init_cfg=dict(type='OfficialPretrained', checkpoint=PATH_OR_URL)``
loads them into a backbone straight from a config, and :func:`load_official` does so in plain PyTorch.
"""

from ssm_backbones.checkpoints.convert import (
    adapt_stem,
    convert_checkpoint,
    convert_file,
    restore_checkpoint,
    restore_file,
)
from ssm_backbones.checkpoints.files import CheckpointError, read_checkpoint, write_checkpoint
from ssm_backbones.checkpoints.host_loading import convert_or_refuse as _convert_or_refuse  # noqa: F401  sets a hook
from ssm_backbones.checkpoints.initializer import OfficialPretrainedInit
from ssm_backbones.checkpoints.loading import load_backbone, load_official
from ssm_backbones.checkpoints.report import Report

__all__ = [
    'CheckpointError',
    'OfficialPretrainedInit',
    'Report',
    'adapt_stem',
    'convert_checkpoint',
    'convert_file',
    'load_backbone',
    'load_official',
    'read_checkpoint',
    'restore_checkpoint',
    'restore_file',
    'write_checkpoint',
]
