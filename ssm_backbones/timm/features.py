"""A backbone's feature maps, with the interface of timm's models of ``features_only=True``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from timm.models import FeatureInfo
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from ssm_backbones.backbones.base import SSMBackbone
from ssm_backbones.layers.common import feature_map
from ssm_backbones.layers.simple_pyramid import STRIDES
from ssm_backbones.timm.classifier import set_recomputation, stage_info, stage_maps

_CLASSIFIER_OPTIONS = ('num_classes', 'global_pool', 'drop_rate')


class SSMFeatures(nn.Module):
    """A backbone that returns a list of maps (B, C_i, H_i, W_i), those of ``create_backbone``: with output norms.

    Args:
        family: The backbone's class.
        arch: Its arch.
        in_chans: Channels of the images.
        out_indices: Stages whose maps are returned, in that order, negative ones counted from the end; an integer means
            the last so many. All by default; of a plain V2M, whose stages are its blocks, the last three. With a
            ``pyramid``, levels of it.
        options: Further arguments of the family's class, such as ``drop_path_rate``, and ``pyramid`` of a plain V2M.

    Attributes:
        feature_info: timm's ``FeatureInfo``.
        return_layers: transformers' ``TimmBackbone`` lists all stages here to be given the maps of all that are built.
    """

    output_fmt = 'NCHW'

    def __init__(
        self,
        family: type[SSMBackbone],
        arch: str,
        in_chans: int = 3,
        out_indices: int | Sequence[int] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        for key in _CLASSIFIER_OPTIONS:
            options.pop(key, None)
        self.levels: tuple[int, ...] | None = None
        if options.get('pyramid') is not None:
            self.backbone: SSMBackbone = family(arch=arch, in_channels=in_chans, **options)  # type: ignore[call-arg]
            self.levels = indices = tuple(feature_take_indices(len(STRIDES), out_indices)[0])
            info = [
                dict(num_chs=channels, reduction=stride, module=f'backbone.pyramid.maps.{i}', index=i)
                for i, (channels, stride) in enumerate(zip(self.backbone.out_channels, STRIDES, strict=True))
            ]
        else:
            settings = family.ARCHS[getattr(family, 'ALIASES', {}).get(arch, arch)]
            if out_indices is None and 'depth' in settings:
                out_indices = 3
            stages = settings.get('depth') or len(settings['depths'])
            indices = tuple(feature_take_indices(stages, out_indices)[0])
            self.backbone = family(arch=arch, in_channels=in_chans, out_indices=indices, **options)  # type: ignore[call-arg]
            info = stage_info(self.backbone, 'backbone.map{}')
        self.in_chans = in_chans
        self.feature_info = FeatureInfo(info, indices)
        self.return_layers: Mapping[str, str] | None = None

    def forward(self, x: Tensor) -> list[Tensor]:
        """Compute the maps of images (B, in_chans, H, W) of any H, W >= 1."""
        everything = self.return_layers is not None and len(self.return_layers) > len(self.feature_info.out_indices)
        if self.levels is not None:
            maps = self.backbone(x)
            return list(maps) if everything else [maps[i] for i in self.levels]
        if not everything:
            return list(self.backbone(x))
        return [
            self.backbone.output(i, stage_map)
            if i in self.backbone.out_indices
            else feature_map(self.backbone.drop_class_tokens(stage_map))
            for i, stage_map in enumerate(stage_maps(self.backbone, x, len(self.backbone.stages)))
        ]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass to save memory, or stop doing so."""
        set_recomputation(self.backbone, enable)
