"""Official checkpoints straight into a config's backbone."""

from __future__ import annotations

from mmengine.logging import print_log
from mmengine.model import update_init_info
from mmengine.registry import WEIGHT_INITIALIZERS
from torch import nn

from ssm_backbones.backbones.base import SSMBackbone
from ssm_backbones.checkpoints.loading import load_official, returns_last_stage_alone


@WEIGHT_INITIALIZERS.register_module(name='OfficialPretrained')
class OfficialPretrainedInit:
    """``init_cfg=dict(type='OfficialPretrained', checkpoint=...)`` of a backbone: :func:`load_official`.

    Args:
        checkpoint: path or URL of a checkpoint of the authors'.
        weights: which of the file's weights, see :func:`convert_checkpoint`.
        in_channels: adapt the stem to images of so many channels, see :func:`adapt_stem`.
        classifier_norm: whether a classifier's output norm is loaded, see :func:`load_official`. None loads it into a
            backbone that returns the last stage's map alone, as a classifier's does; a backbone that returns any other
            maps starts with new output norms for all of them, as in the authors' detectors and segmentors.
    """

    def __init__(
        self,
        checkpoint: str,
        weights: str = 'auto',
        in_channels: int | None = None,
        classifier_norm: bool | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.weights = weights
        self.in_channels = in_channels
        self.classifier_norm = classifier_norm

    def __call__(self, module: nn.Module) -> None:
        classifier_norm = self.classifier_norm
        if classifier_norm is None:
            classifier_norm = isinstance(module, SSMBackbone) and returns_last_stage_alone(module)
        report = load_official(
            module, self.checkpoint, weights=self.weights, in_channels=self.in_channels, classifier_norm=classifier_norm
        )
        print_log(str(report), logger='current')
        if hasattr(module, '_params_init_info'):
            update_init_info(module, init_info=f'OfficialPretrained: load from {self.checkpoint}')
