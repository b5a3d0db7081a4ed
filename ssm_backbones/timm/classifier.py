"""A classifier of a backbone, with the interface of timm's models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from ssm_backbones.backbones.base import SSMBackbone
from ssm_backbones.backbones.v2m import PlainV2M
from ssm_backbones.checkpoints import convert_checkpoint
from ssm_backbones.checkpoints.identify import FAMILIES
from ssm_backbones.checkpoints.locate import holds_official
from ssm_backbones.layers.common import feature_map
from ssm_backbones.timm.heads import Mamba2DHead, build_head

# As the recipes do: nothing should pull the scans' rates and gains and the position embedding towards zero.
_UNDECAYED = ('.A_log', '.D', '.dt_bias', '.pos_embed', '.cls_token')


class SSMClassifier(nn.Module):
    """A backbone and its family's classification head, named as in mmpretrain's checkpoints (``backbone.``, ``head.``).

    Args:
        family: The backbone's class.
        arch: Its arch.
        num_classes: Number of classes; 0 leaves out the classifier's last layer.
        in_chans: Channels of the images.
        global_pool: timm's name of the pooling, '' for none.
        drop_rate: Dropout before the last layer while training.
        options: Further arguments of the family's class, such as ``drop_path_rate``.
    """

    output_fmt = 'NCHW'

    def __init__(
        self,
        family: type[SSMBackbone],
        arch: str,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = 'avg',
        drop_rate: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__()
        refused: list[str] = [key for key in ('pyramid', 'out_type') if key in options]
        if options.get('cls_token', 'mean') != 'mean':
            refused.append('cls_token')
        if refused:
            raise ValueError(
                f'a classifier pools the last map and takes no {", ".join(refused)}; features_only=True takes pyramid, '
                'and mmpretrain configs class tokens'
            )
        self.backbone: SSMBackbone = family(arch=arch, in_channels=in_chans, out_indices=-1, **options)  # type: ignore[call-arg]
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.num_features = self.backbone.num_features[-1]
        self.head = build_head(self.backbone, num_classes, global_pool, drop_rate)
        self.head_hidden_size: int = self.head.num_features  # type: ignore[assignment]
        self.feature_info = stage_info(self.backbone, 'backbone.stages.{}')

    def forward(self, x: Tensor) -> Tensor:
        """Compute scores (B, num_classes) of images (B, in_chans, H, W) of any H, W >= 1."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Compute the last map, normalised, (B, num_features, H', W')."""
        return self.backbone(x)[-1]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Compute scores of the last map, or with ``pre_logits`` the features (B, head_hidden_size) before them."""
        return self.head(x, pre_logits=pre_logits)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
    ) -> Any:
        """Compute the maps of the stages (of a plain V2M's blocks), without output norms, and the last map.

        Args:
            x: Images (B, in_chans, H, W).
            indices: Stages whose maps are wanted; an integer means the last so many, None all.
            norm: Apply the last stage's output norm to its map (a plain V2M's to all maps).
            stop_early: Leave out the stages after the last one wanted.
            output_fmt: 'NCHW' or 'NHWC'.
            intermediates_only: Return only the list of maps.

        Returns:
            The last map as of :meth:`forward_features` and the list of maps, or only that list.
        """
        if output_fmt not in ('NCHW', 'NHWC'):
            raise ValueError(f"output_fmt is 'NCHW' or 'NHWC', got {output_fmt!r}")
        stages = self.backbone.stages
        wanted, last = feature_take_indices(len(stages), indices)
        output_norm = self.backbone.output_norm(self.backbone.out_indices[-1])
        everywhere = isinstance(self.backbone, PlainV2M)
        maps = []
        for i, stage_map in enumerate(stage_maps(self.backbone, x, last + 1 if stop_early else len(stages))):
            if i in wanted:
                tokens = output_norm(stage_map) if norm and (everywhere or i == len(stages) - 1) else stage_map
                tokens = self.backbone.drop_class_tokens(tokens)
                maps.append(feature_map(tokens) if output_fmt == 'NCHW' else tokens)
        if intermediates_only:
            return maps
        return self.backbone.output(self.backbone.out_indices[-1], stage_map), maps

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the stages after the last one in ``indices``, and the norm and head if asked to.

        Returns:
            The indices, counted from the start.
        """
        wanted, last = feature_take_indices(len(self.backbone.stages), indices)
        self.backbone.stages = self.backbone.stages[: last + 1]
        self.backbone.stages[last].downsample = nn.Identity()
        if prune_norm:
            setattr(self.backbone, f'norm{self.backbone.out_indices[-1]}', nn.Identity())
        if prune_head:
            self.reset_classifier(0, '')
        return list(wanted)

    @property
    def classifier_name(self) -> str:
        """Name of the head's last layer."""
        return 'fc2' if isinstance(self.head, Mamba2DHead) else 'fc'

    def get_classifier(self) -> nn.Module:
        """Return the last layer, an identity without classes."""
        return self.head.get_submodule(self.classifier_name)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the last layer by a new one, and the pooling unless it is None."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)  # type: ignore[operator]

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass to save memory, or stop doing so."""
        set_recomputation(self.backbone, enable)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters of two or more dimensions that weight decay should leave alone."""
        return {name for name, _ in self.named_parameters() if name.endswith(_UNDECAYED)}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's patterns of parameter groups: the stem, each block (or stage, if ``coarse``), the rest.

        A stage's downsampling and own norm belong to its last block, as in ``backbone.get_layer_depth``.
        """
        if coarse:
            return dict(stem=r'^backbone\.patch_embed', blocks=r'^backbone\.stages\.(\d+)')
        return dict(
            stem=r'^backbone\.patch_embed',
            blocks=[
                (r'^backbone\.stages\.(\d+)\.blocks\.(\d+)', None),
                (r'^backbone\.stages\.(\d+)\.(?:downsample|norm)', (99999,)),
            ],
        )

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a state dict with this model's names, or the authors', which are converted."""
        if holds_official(state_dict, FAMILIES):
            state_dict = convert_checkpoint(state_dict)[0]['state_dict']
        return super().load_state_dict(state_dict, strict=strict, assign=assign)


def stage_maps(backbone: SSMBackbone, x: Tensor, count: int) -> Iterator[Tensor]:
    """Yield the maps (B, H, W, C) of the first ``count`` stages of images (B, in_chans, H, W), before output norms."""
    backbone.check_images(x)
    x = backbone.patch_embed(x)
    for stage in backbone.stages[:count]:
        x = stage(x)
        yield x
        x = stage.to_next(x)


def stage_info(backbone: SSMBackbone, module: str) -> list[dict[str, Any]]:
    """Return what timm's ``FeatureInfo`` is made of: channels, stride and module of every stage of the arch."""
    strides = [16 if isinstance(backbone, PlainV2M) else 4 * 2**i for i in range(len(backbone.num_features))]
    return [
        dict(num_chs=channels, reduction=stride, module=module.format(i), index=i)
        for i, (channels, stride) in enumerate(zip(backbone.num_features, strides, strict=True))
    ]


def set_recomputation(backbone: SSMBackbone, enable: bool) -> None:
    """Recompute the blocks of a backbone in the backward pass, or stop doing so."""
    backbone.with_cp = enable
    for stage in backbone.stages:
        stage.with_cp = enable
