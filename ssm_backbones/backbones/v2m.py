"""V2M: a 2-D state-space model on images, Wang et al. 2024, arXiv 2410.10382; plain and hierarchical."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from ssm_backbones.backbones.base import (
    SSMBackbone,
    Stage,
    check_depths,
    check_integer,
    drop_path_schedule,
    resolve_arch,
    resolve_out_indices,
)
from ssm_backbones.backbones.vmamba import VSSBackbone, check_ssm_ratio
from ssm_backbones.layers.common import Residual
from ssm_backbones.layers.simple_pyramid import STRIDES, SimplePyramid
from ssm_backbones.layers.token_grid import TokenGrid
from ssm_backbones.layers.v2m_mixer import HierarchicalV2MMixer, PlainV2MMixer
from ssm_backbones.utils.mm import MODELS
from ssm_backbones.utils.torch_compat import RMSNorm

PATCH_SIZE = 16
INNER_RATIO = 2
_ARCH_KEYS = {
    'plain': ('layout', 'embed_dims', 'depth', 'd_state'),
    'hierarchical': ('layout', 'embed_dims', 'depths', 'd_state', 'ssm_ratio'),
}


def _plain(embed_dims: int, depth: int, d_state: int) -> dict[str, Any]:
    return dict(layout='plain', embed_dims=embed_dims, depth=depth, d_state=d_state)


def _hierarchical(embed_dims: int, depths: list[int], d_state: int) -> dict[str, Any]:
    return dict(layout='hierarchical', embed_dims=embed_dims, depths=depths, d_state=d_state, ssm_ratio=1.0)


@MODELS.register_module()
class V2M(SSMBackbone):
    """V2M's backbones: the constructor returns a :class:`PlainV2M` or a :class:`HierarchicalV2M`, as ``arch`` says.

    Args:
        arch: One of ``V2M.ARCHS``, or a dict with the keys ``layout``: 'plain' or 'hierarchical', ``embed_dims``
            (channels; those of the first stage), ``d_state`` (state size), and ``depth`` (blocks) for a plain one, or
            ``depths`` (blocks of each stage) and ``ssm_ratio`` (inner width of the scan over the channels) for a
            hierarchical one.
        options: Arguments of the class of the arch's layout.
    """

    # The paper gives 30 M parameters and 5.4 GFLOPs, and 50 M and 9.6 G, for the hierarchical ones, and no more. Here
    # the widths and the first and last stage are VMamba-T's, and the gate adds a product to each block. The state size,
    # a third block in the second stage, and the third stage's depth are chosen to meet both figures at once: 30.8 M and
    # 5.39 G, 50.9 M and 9.45 G with the classification head.
    # The plain ones follow the paper's settings: 6.9 M and 25.2 M. They take 3.14 G and 8.88 G, of which the six scans
    # of each block are 1.56 G and 3.12 G; the paper's 1.9 G and 5.9 G are about what a single corner would take, 1.76 G
    # and 5.77 G (layer by layer in docs/flops.md).
    ARCHS: ClassVar[dict[str, dict[str, Any]]] = {
        'tiny': _plain(192, depth=24, d_state=16),
        'small': _plain(384, depth=24, d_state=16),
        'hier-small': _hierarchical(96, [2, 3, 7, 2], d_state=4),
        'hier-base': _hierarchical(96, [2, 3, 19, 2], d_state=4),
        'test': _plain(16, depth=4, d_state=4),
        'test-hier': _hierarchical(16, [1, 1, 2, 1], d_state=2),
    }

    def __new__(cls, arch: str | Mapping[str, Any] = 'tiny', *args: Any, **options: Any) -> 'V2M':
        if cls is V2M:
            cls = {'plain': PlainV2M, 'hierarchical': HierarchicalV2M}[resolve_v2m_arch(arch)['layout']]
        return super().__new__(cls)


class PlainV2M(V2M):
    """V2M at one resolution, stride 16: patches, position embedding, and blocks ``x + mixer(RMSNorm(x))``.

    Every block is a stage: ``out_indices`` and ``frozen_stages`` count blocks.

    Args:
        arch: See :class:`V2M`.
        img_size: Side, or height and width, of the images that the position embedding is created for. It is resized
            bicubically for images of any other size and for weights trained at any other size.
        cls_token: Source of the class output: 'mean' pools the map; 'corner' and 'center' take the token where an extra
            row and column of class tokens cross, at the upper left or in the middle. Feature maps exclude these tokens.
        out_type: 'featmap' returns maps; 'cls_token' class outputs (B, C) instead, for a head without a neck.
        pyramid: None returns the maps of stride 16 (normalised, C channels) of the blocks in ``out_indices``. 'single'
            and 'multi' return four maps of strides 4, 8, 16 and 32 with C/4, C/2, C and C channels, as a
            hierarchical backbone's heads expect: 'single' computes all of them from one block's map, 'multi' each from
            the map of one of four blocks. ``out_channels`` gives the channels.
        in_channels: Channels of the images.
        out_indices: Blocks whose maps are used, in that order; negative ones count from the end. One for 'single', four
            for 'multi', from the finest map to the coarsest. None takes the last one, or for 'multi' the last of each
            quarter of the depth.
        drop_path_rate: Probability of dropping the last block's branch; it rises linearly from 0 in the first one.
        frozen_stages: -1 trains everything, 0 freezes the stem, k the stem and the first k blocks.
        with_cp: Recompute the blocks in the backward pass to save memory.
        norm_eval: See :class:`~ssm_backbones.backbones.base.SSMBackbone`.
        init_cfg: mmengine's initialisation config.
    """

    patch_embed: TokenGrid

    def __init__(
        self,
        arch: str | Mapping[str, Any] = 'tiny',
        img_size: int | Sequence[int] = 224,
        cls_token: str = 'mean',
        out_type: str = 'featmap',
        pyramid: str | None = None,
        in_channels: int = 3,
        out_indices: int | Sequence[int] | None = None,
        drop_path_rate: float = 0.0,
        frozen_stages: int = -1,
        with_cp: bool = False,
        norm_eval: bool = False,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        settings = resolve_v2m_arch(arch, 'plain')
        embed_dims = check_integer('embed_dims', settings['embed_dims'], minimum=1)
        d_state = check_integer('d_state', settings['d_state'], minimum=1)
        depth = check_integer('depth', settings['depth'], minimum=1)
        if out_type not in ('featmap', 'cls_token'):
            raise ValueError(f"out_type is 'featmap' or 'cls_token', got {out_type!r}")
        super().__init__(
            num_features=[embed_dims] * depth,
            in_channels=in_channels,
            out_indices=_blocks_of_pyramid(pyramid, out_type, out_indices, depth),
            frozen_stages=frozen_stages,
            with_cp=with_cp,
            norm_eval=norm_eval,
            init_cfg=init_cfg,
        )
        self.out_type = out_type
        self.patch_embed = TokenGrid(in_channels, embed_dims, PATCH_SIZE, _grid_size(img_size), cls_token)
        rates = drop_path_schedule(drop_path_rate, [depth])[0]
        self.stages = nn.ModuleList(
            Stage([PlainBlock(embed_dims, d_state, depth, rate)], with_cp=with_cp)
            for rate in rates[: self.num_built_stages]
        )
        self.pyramid = None if pyramid is None else SimplePyramid(embed_dims)
        self._init_output_norms()

    @property
    def out_channels(self) -> tuple[int, ...]:
        return super().out_channels if self.pyramid is None else self.pyramid.out_channels

    @property
    def strides(self) -> tuple[int, ...]:
        return super().strides if self.pyramid is None else STRIDES

    @property
    def output_modules(self) -> dict[int, str]:
        if self.pyramid is None:
            return super().output_modules
        return {i: f'pyramid.maps.{i}' for i in range(len(STRIDES))}

    @property
    def returns_maps(self) -> bool:
        return self.pyramid is None and self.out_type == 'featmap'

    @property
    def stage_strides(self) -> tuple[int, ...]:
        return (PATCH_SIZE,) * self.num_built_stages

    @property
    def stage_names(self) -> tuple[str, ...]:
        return tuple(f'block {i}' for i in range(self.num_built_stages))

    def build_output_norm(self, stage: int) -> nn.Module:
        """Build the norm of a block's map; an identity with a pyramid, which has its own norms."""
        return RMSNorm(self.num_features[stage], eps=1e-5) if self.pyramid is None else nn.Identity()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute maps (B, C_i, ceil(H/stride), ceil(W/stride)) of images (B, in_channels, H, W) of any H, W >= 1.

        With ``out_type='cls_token'``, compute class outputs (B, C) instead. One per out index, or four of the pyramid.
        """
        outputs = super().forward(x)
        if self.pyramid is None:
            return outputs
        return self.pyramid(outputs * (len(STRIDES) // len(outputs)), x.shape[2], x.shape[3])

    def leaves_out(self, name: str) -> bool:
        """Return whether a tensor belongs to a part that was not built, the pyramid included."""
        return (self.pyramid is None and name.startswith('pyramid.')) or super().leaves_out(name)

    def output(self, stage: int, x: Tensor) -> Tensor:
        """Return a block's map without class tokens (channel-last before a pyramid), or its class output."""
        if self.out_type == 'cls_token':
            return self.patch_embed.class_output(self.output_norm(stage)(x))
        x = self.drop_class_tokens(x)
        return super().output(stage, x) if self.pyramid is None else x

    def drop_class_tokens(self, x: Tensor) -> Tensor:
        """Return a block's map (B, H, W, C) without the row and column of class tokens."""
        return self.patch_embed.patches(x)


class PlainBlock(nn.Module):
    """``x + mixer(RMSNorm(x))`` on maps (B, H, W, C).

    Args:
        channels: Width C.
        d_state: State size N of the scans.
        depth: Blocks of the whole backbone.
        drop_path: Probability of dropping the branch of a sample while training.
    """

    def __init__(self, channels: int, d_state: int, depth: int, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm = RMSNorm(channels, eps=1e-5)
        self.mixer = PlainV2MMixer(
            channels, INNER_RATIO * channels, d_state, dt_rank=math.ceil(channels / 16), depth=depth
        )
        self.residual = Residual(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        return self.residual(x, self.mixer(self.norm(x)))


class HierarchicalV2M(V2M, VSSBackbone):
    """V2M in stages: VMamba's stem, downsampling and MLPs around V2M's mixer.

    Args:
        arch: See :class:`V2M`.
        in_channels: Channels of the images.
        out_indices: Stages whose maps are returned, in that order. Stage i has stride ``4 * 2**i``.
        drop_path_rate: Probability of dropping a branch in the last block; it rises linearly from 0 in the first one.
        frozen_stages: -1 trains everything, 0 freezes the stem, k the stem and the first k stages.
        with_cp: Recompute the blocks in the backward pass to save memory.
        norm_eval: See :class:`~ssm_backbones.backbones.base.SSMBackbone`.
        init_cfg: mmengine's initialisation config.
    """

    def __init__(
        self,
        arch: str | Mapping[str, Any] = 'hier-small',
        in_channels: int = 3,
        out_indices: int | Sequence[int] = (0, 1, 2, 3),
        drop_path_rate: float = 0.0,
        frozen_stages: int = -1,
        with_cp: bool = False,
        norm_eval: bool = False,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        settings = resolve_v2m_arch(arch, 'hierarchical')
        embed_dims = check_integer('embed_dims', settings['embed_dims'], minimum=2)
        d_state = check_integer('d_state', settings['d_state'], minimum=1)
        depths = check_depths('depths', settings['depths'])
        ssm_ratio = check_ssm_ratio(settings['ssm_ratio'], embed_dims)

        def mixer(channels: int) -> nn.Module:
            return HierarchicalV2MMixer(
                channels, int(ssm_ratio * channels), d_state, dt_rank=math.ceil(channels / 16), depth=sum(depths)
            )

        super().__init__(
            embed_dims=embed_dims,
            depths=depths,
            mixer=mixer,
            drop_path_rate=drop_path_rate,
            in_channels=in_channels,
            out_indices=out_indices,
            frozen_stages=frozen_stages,
            with_cp=with_cp,
            norm_eval=norm_eval,
            init_cfg=init_cfg,
        )


def resolve_v2m_arch(arch: str | Mapping[str, Any], layout: str | None = None) -> dict[str, Any]:
    """Return the settings of ``arch``.

    Raises:
        ValueError: If the name, the layout or a key is unknown, a key is missing, or the layout is not the given one.
        TypeError: If ``arch`` is neither a name nor a mapping.
    """
    keys = _ARCH_KEYS['plain']
    if isinstance(arch, Mapping):
        # A list or a dict cannot be looked up.
        if arch.get('layout') not in list(_ARCH_KEYS):
            raise ValueError(
                f"V2M's arch dict has the layout 'plain' or 'hierarchical', got {arch.get('layout')!r} in {dict(arch)}"
            )
        keys = _ARCH_KEYS[arch['layout']]
    settings = resolve_arch('V2M', arch, V2M.ARCHS, {}, keys)
    if layout not in (None, settings['layout']):
        raise ValueError(f"arch {arch!r} is {settings['layout']}, not {layout}; type='V2M' takes both")
    return settings


def _grid_size(img_size: int | Sequence[int]) -> tuple[int, int]:
    """Return the rows and columns of patches in an image of ``img_size``."""
    sides = [img_size] * 2 if isinstance(img_size, str) or not isinstance(img_size, Sequence) else img_size
    if len(sides) != 2:
        raise ValueError(f'img_size is a side, or height and width, got {img_size!r}')
    height, width = (-(-check_integer('img_size', side, minimum=1) // PATCH_SIZE) for side in sides)
    return height, width


def _blocks_of_pyramid(
    pyramid: str | None, out_type: str, out_indices: int | Sequence[int] | None, depth: int
) -> tuple[int, ...]:
    """Return the blocks whose maps are used, checked against the pyramid."""
    if pyramid not in (None, 'single', 'multi'):
        raise ValueError(f"pyramid is None, 'single' or 'multi', got {pyramid!r}")
    if pyramid is not None and out_type != 'featmap':
        raise ValueError(f'a pyramid is made of maps: out_type={out_type!r} needs pyramid=None, got {pyramid!r}')
    if out_indices is None:
        out_indices = [depth * k // 4 - 1 for k in range(1, 5)] if pyramid == 'multi' else -1
    blocks = resolve_out_indices(out_indices, depth)
    wanted = {None: len(blocks), 'single': 1, 'multi': len(STRIDES)}[pyramid]
    if len(blocks) != wanted:
        raise ValueError(f'pyramid={pyramid!r} takes {wanted} of the blocks in out_indices, got {out_indices!r}')
    return blocks
