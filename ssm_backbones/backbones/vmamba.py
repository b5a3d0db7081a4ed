"""VMamba: visual state-space model, Liu et al. 2024, arXiv 2401.10166."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from ssm_backbones.backbones.base import (
    SSMBackbone,
    Stage,
    check_depths,
    check_integer,
    check_number,
    drop_path_schedule,
    resolve_arch,
)
from ssm_backbones.layers.common import MLP, ConvNorm, ConvStem, PatchEmbed, PatchMerging, Residual, init_linear
from ssm_backbones.layers.ss2d import SS2D
from ssm_backbones.utils.mm import MODELS

MLP_RATIO = 4


class VSSBlock(nn.Module):
    """``x + mixer(LN(x))``, then ``x + MLP(LN(x))``, on maps (B, H, W, C).

    Args:
        channels: Width C.
        mixer: Module from (B, H, W, C) to the same.
        mlp: Whether to include the MLP, which VMamba's first release does not have.
        drop_path: Probability of dropping each branch of a sample while training.
    """

    def __init__(self, channels: int, mixer: nn.Module, mlp: bool = True, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.mixer = mixer
        self.norm2 = nn.LayerNorm(channels) if mlp else None
        self.mlp = MLP(channels, MLP_RATIO * channels) if mlp else None
        if self.mlp is not None:
            init_linear(self.mlp.fc1, self.mlp.fc2)
        self.residual = Residual(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = self.residual(x, self.mixer(self.norm1(x)))
        if self.norm2 is not None and self.mlp is not None:
            x = self.residual(x, self.mlp(self.norm2(x)))
        return x


class VSSBackbone(SSMBackbone):
    """VMamba's macro design around any mixer: stem, stages of :class:`VSSBlock`, and downsampling between them.

    Args:
        embed_dims: Channels of the first stage; they double with each.
        depths: Blocks of each stage.
        mixer: Builds a mixer for a number of channels.
        drop_path_rate: Probability of dropping a branch in the last block; it rises linearly from 0 in the first one.
        first_release: Cut and merge patches instead of halving by padded convolutions, and leave out the MLPs.
        options: Arguments of :class:`~ssm_backbones.backbones.base.SSMBackbone`.
    """

    def __init__(
        self,
        *,
        embed_dims: int,
        depths: Sequence[int],
        mixer: Callable[[int], nn.Module],
        drop_path_rate: float,
        first_release: bool = False,
        **options: Any,
    ) -> None:
        widths = [embed_dims * 2**i for i in range(len(depths))]
        super().__init__(num_features=widths, **options)
        rates = drop_path_schedule(drop_path_rate, depths)
        if first_release:
            self.patch_embed = PatchEmbed(self.in_channels, embed_dims, patch_size=4)
        elif embed_dims % 2:
            raise ValueError(f'the stem halves embed_dims, which must be even, got {embed_dims}')
        else:
            self.patch_embed = ConvStem(self.in_channels, embed_dims)
        self.stages = nn.ModuleList()
        for i in range(self.num_built_stages):
            blocks = [VSSBlock(widths[i], mixer(widths[i]), mlp=not first_release, drop_path=rate) for rate in rates[i]]
            downsample: nn.Module | None = None
            if i + 1 < self.num_built_stages:
                downsample = (
                    PatchMerging(widths[i], widths[i + 1])
                    if first_release
                    else ConvNorm(widths[i], widths[i + 1], kernel_size=3, stride=2, padding=1)
                )
            self.stages.append(Stage(blocks, downsample, self.with_cp))
        self._init_output_norms()


def check_ssm_ratio(ssm_ratio: float, embed_dims: int) -> float:
    """Check the ratio of the scan's inner width to the channels, which has to give a whole number of channels."""
    ssm_ratio = check_number('ssm_ratio', ssm_ratio)
    if not ssm_ratio > 0 or ssm_ratio * embed_dims % 1:
        raise ValueError(
            f'ssm_ratio must be positive and give a whole number of channels, got {ssm_ratio:g} of {embed_dims}'
        )
    return ssm_ratio


def _arch(embed_dims: int, depths: list[int], ssm_ratio: float) -> dict[str, Any]:
    return dict(embed_dims=embed_dims, depths=depths, d_state=1, ssm_ratio=ssm_ratio, version='v2')


def _first_release(embed_dims: int, depths: list[int]) -> dict[str, Any]:
    return dict(embed_dims=embed_dims, depths=depths, d_state=16, ssm_ratio=2.0, version='v0')


@MODELS.register_module()
class VMamba(VSSBackbone):
    """VMamba's hierarchical backbone.

    Args:
        arch: One of ``VMamba.ARCHS`` or ``VMamba.ALIASES`` ('tiny', 'small', 'base'), or a dict with the keys
            ``embed_dims`` (channels of the first stage; they double with each), ``depths`` (blocks of each stage),
            ``d_state`` (state size), ``ssm_ratio`` (inner width of the scan over the channels) and ``version``: 'v2',
            or 'v0' for the first release.
        in_channels: Channels of the images.
        out_indices: Stages whose maps are returned, in that order. Stage i has stride ``4 * 2**i``.
        drop_path_rate: Probability of dropping a branch in the last block; it rises linearly from 0 in the first one.
        frozen_stages: -1 trains everything, 0 freezes the stem, k the stem and the first k stages.
        with_cp: Recompute the blocks in the backward pass to save memory.
        norm_eval: See :class:`~ssm_backbones.backbones.base.SSMBackbone`.
        init_cfg: mmengine's initialisation config.

    Any image size works. v2 downsamples by padded convolutions, each giving ceil(size / 2). v0 cuts patches and pads
    incomplete ones with zeros at the bottom and right.
    """

    ARCHS: ClassVar[dict[str, dict[str, Any]]] = {
        'tiny-s1l8': _arch(96, [2, 2, 8, 2], ssm_ratio=1.0),
        'tiny-s2l5': _arch(96, [2, 2, 5, 2], ssm_ratio=2.0),
        'small-s2l15': _arch(96, [2, 2, 15, 2], ssm_ratio=2.0),
        'small-s1l20': _arch(96, [2, 2, 20, 2], ssm_ratio=1.0),
        'base-s2l15': _arch(128, [2, 2, 15, 2], ssm_ratio=2.0),
        'base-s1l20': _arch(128, [2, 2, 20, 2], ssm_ratio=1.0),
        'tiny-v0': _first_release(96, [2, 2, 9, 2]),
        'small-v0': _first_release(96, [2, 2, 27, 2]),
        'base-v0': _first_release(128, [2, 2, 27, 2]),
        'test': _arch(16, [1, 1, 2, 1], ssm_ratio=1.0),
    }
    ALIASES: ClassVar[dict[str, str]] = {'tiny': 'tiny-s1l8', 'small': 'small-s2l15', 'base': 'base-s2l15'}
    _ARCH_KEYS = ('embed_dims', 'depths', 'd_state', 'ssm_ratio', 'version')

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
        settings = resolve_arch('VMamba', arch, self.ARCHS, self.ALIASES, self._ARCH_KEYS)
        version = settings['version']
        if version not in ('v0', 'v2'):
            raise ValueError(f"VMamba's version is 'v2' or 'v0' (the first release), got {version!r}")
        embed_dims = check_integer('embed_dims', settings['embed_dims'], minimum=2)
        d_state = check_integer('d_state', settings['d_state'], minimum=1)
        depths = check_depths('depths', settings['depths'])
        ssm_ratio = check_ssm_ratio(settings['ssm_ratio'], embed_dims)
        first_release = version == 'v0'

        def mixer(channels: int) -> nn.Module:
            return SS2D(
                channels,
                inner_channels=int(ssm_ratio * channels),
                d_state=d_state,
                dt_rank=math.ceil(channels / 16),
                gate=first_release,
                conv_bias=first_release,
            )

        super().__init__(
            embed_dims=embed_dims,
            depths=depths,
            mixer=mixer,
            drop_path_rate=drop_path_rate,
            first_release=first_release,
            in_channels=in_channels,
            out_indices=out_indices,
            frozen_stages=frozen_stages,
            with_cp=with_cp,
            norm_eval=norm_eval,
            init_cfg=init_cfg,
        )
