"""Initializer that loads official checkpoints into a config's backbone."""

from __future__ import annotations

from torch import nn

from ssm_backbones.backbones.base import SSMBackbone
from ssm_backbones.checkpoints.loading import load_official, returns_last_stage_alone
from ssm_backbones.utils.mm import WEIGHT_INITIALIZERS, print_log


@WEIGHT_INITIALIZERS.register_module(name='OfficialPretrained')
class OfficialPretrainedInit:
    """``init_cfg=dict(type='OfficialPretrained', checkpoint=...)`` of a backbone: :func:`load_official`.

    Args:
        checkpoint: Path or URL of an official checkpoint.
        weights: Set of weights in the file, see :func:`convert_checkpoint`.
        in_channels: Number of image channels to adapt the stem to, see :func:`adapt_stem`.
        classifier_norm: Whether to load a classifier's output norm, see :func:`load_official`. None loads it only into
            a backbone that returns just the last stage's map, as a classifier's does; others start with new output
            norms, as in the authors' detectors and segmentors.
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
            from mmengine.model import update_init_info

            update_init_info(module, init_info=f'OfficialPretrained: load from {self.checkpoint}')
