"""Mamba2D: a natively two-dimensional state-space model, Baty et al. 2024, arXiv 2412.16146 (version 3)."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssm_backbones.backbones.base import (
    SSMBackbone,
    Stage,
    check_depths,
    check_integer,
    drop_path_schedule,
    resolve_arch,
)
from ssm_backbones.layers.calls import apply_conv, conv2d
from ssm_backbones.layers.common import MLP, ConvNorm, kept_samples
from ssm_backbones.layers.mamba2d_mixer import RotaryAttention, ScanMixer
from ssm_backbones.utils.mm import MODELS
from ssm_backbones.utils.tracing import as_one_node

MLP_RATIO = 4
HEAD_DIM = 32


class ScaledResidual(nn.Module):
    """``x * scale + branch`` with a learned scale for each channel of maps (B, H, W, C).

    Training drops the branch of a whole sample with probability ``drop_prob``, and scales a kept one by
    ``1 / (1 - drop_prob)``.
    """

    def __init__(self, channels: int, drop_prob: float = 0.0) -> None:
        super().__init__()
        self.drop_prob = drop_prob
        self.scale = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:
        if self.drop_prob and self.training:
            keep_prob = 1.0 - self.drop_prob
            branch = branch * kept_samples(branch, keep_prob).div(keep_prob)
        return torch.addcmul(branch, x, self.scale)

    def extra_repr(self) -> str:
        return f'drop_prob={self.drop_prob:.3g}'


class Mamba2DBlock(nn.Module):
    """``x * scale1 + mixer(LN(x))``, then ``x * scale2 + MLP(LN(x))``, on maps (B, H, W, C).

    Args:
        channels: Width C.
        mixer: Module from (B, H, W, C) to the same.
        drop_path: Probability of dropping each branch of a sample while training.
    """

    def __init__(self, channels: int, mixer: nn.Module, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.mixer = mixer
        self.residual1 = ScaledResidual(channels, drop_path)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = MLP(channels, MLP_RATIO * channels)
        self.residual2 = ScaledResidual(channels, drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = self.residual1(x, self.mixer(self.norm1(x)))
        return self.residual2(x, self.mlp(self.norm2(x)))


class NormedStage(Stage):
    """A stage that ends in a LayerNorm: its output is both the feature map and the next stage's input."""

    def __init__(self, channels: int, blocks: Sequence[nn.Module], downsample: nn.Module | None, with_cp: bool) -> None:
        super().__init__(blocks, downsample, with_cp)
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))

    def to_next(self, x: Tensor) -> Tensor:
        self.check_sharding()
        return self.downsample(x) if isinstance(self.downsample, nn.Identity) else apply_conv(self.downsample, x)


class Mamba2DStem(ConvNorm):
    """A 7x7 convolution of stride 4 and a LayerNorm: images (B, C_in, H, W) -> (B, H', W', C).

    H' is max(1, floor((H + 1) / 4)): a side shorter than 3 pixels is padded with zeros.
    """

    def __init__(self, in_channels: int, embed_dims: int) -> None:
        super().__init__(in_channels, embed_dims, kernel_size=7, stride=4, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(_at_least_3_pixels(x.permute(0, 2, 3, 1)).contiguous())


@as_one_node
def _at_least_3_pixels(x: Tensor) -> Tensor:
    """Pad (B, H, W, C) with zeros at the bottom and right until both sides have 3 pixels."""
    bottom, right = (max(3 - size, 0) for size in x.shape[1:3])
    return F.pad(x, (0, 0, 0, right, 0, bottom)) if bottom or right else x


def _arch(embed_dims: list[int], depths: list[int]) -> dict[str, Any]:
    return dict(embed_dims=embed_dims, depths=depths, mixers=['scan', 'scan', 'attention', 'attention'], d_state=16)


@MODELS.register_module()
class Mamba2D(SSMBackbone):
    """Mamba2D's hierarchical backbone.

    The first stages mix by a 2-D scan whose direction alternates: blocks with an odd index in their stage, counted from
    0, scan from the bottom right corner. The last stages mix by self-attention. Each stage ends in a LayerNorm, whose
    output is the feature map.

    Args:
        arch: One of ``Mamba2D.ARCHS``, or a dict with the keys ``embed_dims`` (channels of each stage) and ``depths``
            (blocks of each stage), and optionally ``mixers`` ('scan' or 'attention' for each stage; by default
            attention in the last two and scans before them) and ``d_state`` (state size of the scans, 16).
            Attention needs multiples of 32 channels.
        in_channels: Channels of the images.
        out_indices: Stages whose maps are returned.
        drop_path_rate: Probability of dropping a branch in the last block; it rises linearly from 0 in the first one.
        frozen_stages: -1 trains everything, 0 freezes the stem, k the stem and the first k stages.
        with_cp: Recompute the blocks in the backward pass instead of keeping their activations.
        norm_eval: See :class:`~ssm_backbones.backbones.base.SSMBackbone`.
        init_cfg: mmengine's initialisation config.

    Any image size works. The stem gives max(1, floor((size + 1) / 4)) pixels (a side shorter than 3 pixels is padded
    with zeros at the bottom or right), and each downsampling ceil(size / 2).
    """

    ARCHS: ClassVar[dict[str, dict[str, Any]]] = {
        'nano': _arch([32, 64, 160, 256], [3, 3, 9, 3]),
        'tiny': _arch([64, 128, 320, 512], [3, 3, 9, 3]),
        'small': _arch([96, 192, 384, 576], [3, 12, 14, 3]),
        'test': _arch([16, 24, 32, 64], [2, 2, 1, 1]),
    }
    _ARCH_KEYS = ('embed_dims', 'depths', 'mixers', 'd_state')

    def __init__(
        self,
        arch: str | Mapping[str, Any] = 'tiny',
        in_channels: int = 3,
        out_indices: int | Sequence[int] = (0, 1, 2, 3),
        drop_path_rate: float = 0.0,
        frozen_stages: int = -1,
        with_cp: bool = False,
        norm_eval: bool = False,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        if isinstance(arch, Mapping):
            arch = dict(mixers=None, d_state=16) | dict(arch)
        settings = resolve_arch('Mamba2D', arch, self.ARCHS, {}, self._ARCH_KEYS)
        depths = check_depths('depths', settings['depths'])
        widths = check_depths('embed_dims', settings['embed_dims'])
        d_state = check_integer('d_state', settings['d_state'], minimum=1)
        if len(widths) != len(depths):
            raise ValueError(f'embed_dims and depths must name the same stages, got {widths} and {depths}')
        mixers = _check_mixers(settings['mixers'], widths)

        super().__init__(
            num_features=widths,
            in_channels=in_channels,
            out_indices=out_indices,
            frozen_stages=frozen_stages,
            with_cp=with_cp,
            norm_eval=norm_eval,
            init_cfg=init_cfg,
        )
        rates = drop_path_schedule(drop_path_rate, depths)
        self.patch_embed = Mamba2DStem(self.in_channels, widths[0])
        self.stages = nn.ModuleList()
        for i in range(self.num_built_stages):
            blocks = [
                Mamba2DBlock(widths[i], _mixer(mixers[i], widths[i], d_state, reverse=j % 2 == 1), rates[i][j])
                for j in range(depths[i])
            ]
            last = i + 1 == self.num_built_stages
            downsample = None if last else conv2d(widths[i], widths[i + 1], 3, stride=2, padding=1)
            self.stages.append(NormedStage(widths[i], blocks, downsample, with_cp))
        self._init_output_norms()

    def build_output_norm(self, stage: int) -> nn.Module:
        """Return an identity, because the stage's own LayerNorm has normalised its map."""
        return nn.Identity()


def _check_mixers(mixers: Sequence[str] | None, widths: Sequence[int]) -> tuple[str, ...]:
    """Return the mixer of each stage, or raise an error."""
    stages = len(widths)
    if mixers is None:
        mixers = ['scan' if i < stages - 2 else 'attention' for i in range(stages)]
    if isinstance(mixers, str) or not isinstance(mixers, Sequence):
        raise TypeError(f"mixers takes a sequence of 'scan' and 'attention', one for each stage, got {mixers!r}")
    if len(mixers) != stages:
        raise ValueError(
            f"mixers must name one of 'scan' and 'attention' for each of the {stages} stages, got {list(mixers)}"
        )
    for mixer, width in zip(mixers, widths, strict=True):
        if mixer not in ('scan', 'attention'):
            raise ValueError(f"a stage's mixer is 'scan' or 'attention', got {mixer!r}")
        if mixer == 'attention' and width % HEAD_DIM:
            raise ValueError(
                f'attention needs a multiple of {HEAD_DIM} channels, got embed_dims {list(widths)}; '
                "change them, or the stage's mixer to 'scan'"
            )
    return tuple(mixers)


def _mixer(name: str, channels: int, d_state: int, reverse: bool) -> nn.Module:
    if name == 'attention':
        return RotaryAttention(channels, HEAD_DIM)
    return ScanMixer(channels, d_state, math.ceil(channels / 16), reverse=reverse)
