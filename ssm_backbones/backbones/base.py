"""Base class of the backbones: stages, output norms, freezing, layer depths, and validation of arguments."""

import numbers
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from ssm_backbones.layers.common import FeatureMap
from ssm_backbones.utils.errors import did_you_mean
from ssm_backbones.utils.mm import BaseModule


class Stage(nn.Module):
    """Blocks at one resolution, and the downsampling that leads to the next stage.

    ``forward`` runs the blocks alone, because a feature map is taken before the downsampling.

    Args:
        blocks: Modules from (B, H, W, C) to (B, H, W, C).
        downsample: Layer that leads to the next stage, or None for the last one.
        with_cp: Recompute each block in the backward pass instead of keeping its activations.
    """

    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module | None = None, with_cp: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = nn.Identity() if downsample is None else downsample
        self.with_cp = with_cp

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if self.with_cp and torch.is_grad_enabled() and not isinstance(x, Proxy):
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x

    def to_next(self, x: Tensor) -> Tensor:
        """Downsample the stage's map (B, H, W, C) to the next stage's input; the last stage returns it as it is."""
        self.check_sharding()
        return self.downsample(x)

    def check_sharding(self) -> None:
        """Raise a RuntimeError if FSDP2 shards the downsampling with the stage, whose ``forward`` does not run it."""
        if (
            hasattr(self, 'unshard')
            and 'to_next' not in self.__dict__
            and not hasattr(self.downsample, 'unshard')
            and any(True for _ in self.downsample.parameters())
        ):
            raise RuntimeError(
                'fully_shard(stage) takes the downsampling that runs after the stage with it; call '
                "torch.distributed.fsdp.register_fsdp_forward_method(stage, 'to_next') for each stage, or "
                'fully_shard(stage.downsample) before fully_shard(stage), or shard blocks'
            )


class SSMBackbone(BaseModule):
    """Base of the backbones: ``patch_embed``, ``stages`` and, for each chosen stage i, ``norm{i}`` and ``map{i}``.

    The output norm ``norm{i}`` is channel-last; ``map{i}`` makes the returned map (B, C, H, W) of it.

    A subclass calls this constructor, assigns ``patch_embed`` (image (B, C, H, W) to map (B, H, W, C)) and ``stages``
    (an ``nn.ModuleList`` of :class:`Stage`, the first ``self.num_built_stages`` of the architecture), and ends its own
    constructor with :meth:`_init_output_norms`. Stages after the last chosen one are not built: their parameters would
    get no gradient.

    Args:
        num_features: Channels of each of the architecture's stages.
        in_channels: Channels of the images.
        out_indices: Stages whose maps are returned, in the order of the returned tuple; negative ones count
            from the end.
        frozen_stages: -1 trains everything, 0 freezes the stem, k the stem and the first k stages (with their output
            norms and downsampling).
        with_cp: Trade time for memory: recompute the blocks in the backward pass.
        norm_eval: Keep batch norms in evaluation mode while training. Layer norms behave the same in both modes, so
            this only matters if batch norms were added.
        init_cfg: mmengine's initialisation config, e.g. ``dict(type='Pretrained', checkpoint=...)``.
    """

    before_loading: ClassVar[Callable[['SSMBackbone', dict[str, Any], str], None] | None] = None
    """Hook called with a state dict before it is loaded; set by :mod:`ssm_backbones.checkpoints`."""

    patch_embed: nn.Module
    # An nn.ModuleList, whose items would otherwise count as plain modules instead of stages.
    stages: Any

    def __init__(
        self,
        *,
        num_features: Sequence[int],
        in_channels: int = 3,
        out_indices: int | Sequence[int] = -1,
        frozen_stages: int = -1,
        with_cp: bool = False,
        norm_eval: bool = False,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(init_cfg)
        self.num_features = tuple(num_features)
        self.in_channels = check_integer('in_channels', in_channels, minimum=1)
        self.out_indices = resolve_out_indices(out_indices, len(self.num_features))
        self.frozen_stages = check_integer('frozen_stages', frozen_stages, minimum=-1, maximum=len(self.num_features))
        self.with_cp = with_cp
        self.norm_eval = norm_eval

    @property
    def num_built_stages(self) -> int:
        """Number of the architecture's stages that are built: up to the last one in ``out_indices``."""
        return max(self.out_indices) + 1

    @property
    def out_channels(self) -> tuple[int, ...]:
        """Channels of each returned map."""
        return tuple(self.num_features[i] for i in self.out_indices)

    @property
    def strides(self) -> tuple[int, ...]:
        """Stride of each returned map: pixels of the image along a side of one pixel of the map."""
        return tuple(self.stage_strides[i] for i in self.out_indices)

    @property
    def output_modules(self) -> dict[int, str]:
        """Name of the module that computes each returned map, by the map's index."""
        return {i: f'map{i}' if self.returns_maps else f'norm{i}' for i in self.out_indices}

    @property
    def returns_maps(self) -> bool:
        """Whether the outputs are maps (B, C, H, W) of the output norms, each by its module ``map{i}``."""
        return True

    @property
    def stage_strides(self) -> tuple[int, ...]:
        """Stride of each built stage's map."""
        return tuple(4 * 2**i for i in range(self.num_built_stages))

    @property
    def stage_names(self) -> tuple[str, ...]:
        """Name of each built stage, for titles."""
        return tuple(f'stage {i}' for i in range(self.num_built_stages))

    @property
    def depths(self) -> tuple[int, ...]:
        """Blocks of each built stage."""
        return tuple(len(stage.blocks) for stage in self.stages)

    def _init_output_norms(self) -> None:
        """Add the output norms and freeze the frozen stages; the last call of a subclass's constructor."""
        for i in sorted(self.out_indices):
            self.add_module(f'norm{i}', self.build_output_norm(i))
            if self.returns_maps:
                self.add_module(f'map{i}', FeatureMap())
        self._freeze()

    def build_output_norm(self, stage: int) -> nn.Module:
        """Build the norm of a stage's feature map, on (B, H, W, C)."""
        return nn.LayerNorm(self.num_features[stage])

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute maps (B, C_i, H_i, W_i), one per out index, of images (B, in_channels, H, W) of any H, W >= 1."""
        # Symbolic tracing by torch.fx has neither dtype nor shape to check.
        if not isinstance(x, Proxy):
            self.check_images(x)
        x = self.patch_embed(x)
        maps = {}
        for i, stage in enumerate(self.stages):
            x = stage(x)
            if i in self.out_indices:
                maps[i] = self.output(i, x)
            x = stage.to_next(x)
        return tuple(maps[i] for i in self.out_indices)

    def output(self, stage: int, x: Tensor) -> Tensor:
        """Return a stage's feature map (B, C, H, W) from the map (B, H, W, C) of its last block."""
        x = self.output_norm(stage)(x)
        return getattr(self, f'map{stage}')(x)

    def output_norm(self, stage: int) -> nn.Module:
        """Return the norm of a stage in ``out_indices``.

        Raises:
            RuntimeError: If the subclass's constructor has not added it.
        """
        norm = getattr(self, f'norm{stage}', None)
        if norm is None:
            raise RuntimeError(
                f'{type(self).__name__} has no norm{stage}: its constructor has to end with self._init_output_norms()'
            )
        return norm

    def drop_class_tokens(self, x: Tensor) -> Tensor:
        """Return a stage's map (B, H, W, C) without class tokens; here there are none."""
        return x

    def leaves_out(self, name: str) -> bool:
        """Return whether a tensor belongs to a part of the architecture that this backbone was built without.

        Those parts are the stages after the last of ``out_indices``, the downsampling between, and output norms.
        """
        part = re.match(r'(norm|stages\.)(\d+)\.(\w+)', name)
        if part is None:
            return False
        stage, last = int(part[2]), self.num_built_stages - 1
        if part[1] == 'norm':
            norm = getattr(self, f'norm{stage}', None)
            return stage < len(self.num_features) and not (norm and norm.state_dict())
        return last < stage < len(self.num_features) or (stage == last and part[3] == 'downsample')

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Called by torch and by mmengine, which has its own way of loading state dicts; both pass a copy.
        if SSMBackbone.before_loading is not None:
            SSMBackbone.before_loading(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def check_images(self, x: Tensor) -> None:
        """Raise a ValueError or TypeError if a batch of images has an unsupported shape or dtype."""
        name = type(self).__name__
        if not isinstance(x, Tensor):
            raise TypeError(f'{name} takes a tensor of images (B, {self.in_channels}, H, W), got {type(x).__name__}')
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(
                f'{name} takes images of shape (B, {self.in_channels}, H, W), got {tuple(x.shape)}; '
                'in_channels sets the number of channels'
            )
        if x.shape[2] == 0 or x.shape[3] == 0:
            raise ValueError(f'{name} takes images of at least 1x1 pixels, got shape {tuple(x.shape)}')
        if not x.is_floating_point():
            raise TypeError(
                f'{name} takes floating-point images, got {x.dtype}; normalise them first, as the data '
                'preprocessor of mmpretrain, mmdet and mmseg does'
            )

    def __prepare_scriptable__(self) -> NoReturn:
        # torch.jit.script asks for it, in a whole detector or classifier, too.
        raise RuntimeError(
            f'TorchScript cannot compile {type(self).__name__}: use torch.compile or torch.export, or record the model '
            'by torch.jit.trace'
        )

    def train(self, mode: bool = True) -> 'SSMBackbone':
        """Set training mode, except for the frozen stages, which stay in evaluation mode."""
        super().train(mode)
        self._freeze()
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def frozen_modules(self) -> Iterator[nn.Module]:
        """Yield the modules that ``frozen_stages`` covers."""
        if self.frozen_stages >= 0:
            yield self.patch_embed
        for i, stage in enumerate(self.stages[: max(self.frozen_stages, 0)]):
            yield stage
            if i in self.out_indices:
                yield self.output_norm(i)

    def _freeze(self) -> None:
        for module in self.frozen_modules():
            module.eval().requires_grad_(False)

    def get_layer_depth(self, param_name: str, prefix: str = '') -> tuple[int, int]:
        """Return a parameter's layer for layer-wise learning-rate decay, in mmpretrain's interface.

        Args:
            param_name: The parameter's name in the whole model.
            prefix: The backbone's own prefix in that name, e.g. ``'backbone.'``.

        Returns:
            (layer_id, num_layers): layer_id is 0 for the stem, the running number of the block (from 1) for blocks,
            that of the stage's last block for a downsampling, and num_layers - 1 for output norms and parameters
            outside the backbone.
        """
        depths = self.depths
        num_layers = sum(depths) + 2
        parts = param_name[len(prefix) :].split('.')
        if not param_name.startswith(prefix) or parts[0] not in ('patch_embed', 'stages'):
            return num_layers - 1, num_layers
        if parts[0] == 'patch_embed':
            return 0, num_layers
        stage = int(parts[1])
        if parts[2] == 'blocks':
            return sum(depths[:stage]) + int(parts[3]) + 1, num_layers
        return sum(depths[: stage + 1]), num_layers


def resolve_arch(
    family: str,
    arch: str | Mapping[str, Any],
    archs: Mapping[str, Mapping[str, Any]],
    aliases: Mapping[str, str],
    keys: Sequence[str],
) -> dict[str, Any]:
    """Return the settings of ``arch``: a row of the family's table, given by name or alias, or a copy of the dict.

    Args:
        family: The backbone's type, for messages.
        arch: A name, or a mapping with exactly ``keys``.
        archs: The family's table.
        aliases: Maps short names to names of the table.
        keys: The required keys of a dict.

    Raises:
        ValueError: If the name is unknown, or keys are missing or unknown.
        TypeError: If ``arch`` is neither a name nor a mapping.
    """
    if isinstance(arch, str):
        name = aliases.get(arch, arch)
        if name not in archs:
            known = [*aliases, *archs]
            raise ValueError(
                f'{family} has no arch {arch!r}{did_you_mean(arch, known)}. '
                f'Known: {", ".join(known)}; or pass a dict with the keys {", ".join(keys)}'
            )
        return dict(archs[name])
    if not isinstance(arch, Mapping):
        raise TypeError(f"{family}'s arch is a name or a dict, got {type(arch).__name__}: {arch!r}")
    missing = [key for key in keys if key not in arch]
    unknown = [str(key) for key in arch if key not in keys]
    if missing or unknown:
        faults = [
            f'{what} {", ".join(found)}' for what, found in (('lacks', missing), ('has unknown', unknown)) if found
        ]
        raise ValueError(f"{family}'s arch dict {' and '.join(faults)}; its keys are {', '.join(keys)}")
    return dict(arch)


def resolve_out_indices(out_indices: int | Sequence[int], num_stages: int) -> tuple[int, ...]:
    """Return stage numbers in the given order, with negative ones resolved from the end.

    Raises:
        TypeError: If ``out_indices`` is neither an integer nor a sequence of integers.
        ValueError: If it is empty, or an index is out of range or given twice.
    """
    given = [out_indices] if isinstance(out_indices, int) else out_indices
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise TypeError(f'out_indices takes an integer or a sequence of integers, got {out_indices!r}')
    indices = tuple(
        check_integer('out_indices', i, minimum=-num_stages, maximum=num_stages - 1) % num_stages for i in given
    )
    if not indices:
        raise ValueError('out_indices is empty; name at least one stage')
    if len(set(indices)) < len(indices):
        raise ValueError(f'out_indices names a stage twice: {tuple(given)} of {num_stages} stages')
    return indices


def check_integer(name: str, value: Any, minimum: int, maximum: int | None = None) -> int:
    """Return ``value`` as an int, or raise an error that names the argument."""
    if isinstance(value, bool):
        raise TypeError(f'{name} takes integers, got {value!r}')
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f'{name} takes integers, got {value!r}') from None
    if number < minimum or (maximum is not None and number > maximum):
        allowed = f'at least {minimum}' if maximum is None else f'between {minimum} and {maximum}'
        raise ValueError(f'{name} must be {allowed}, got {number}')
    return number


def check_number(name: str, value: Any) -> float:
    """Return ``value``, a real number, or raise an error that names the argument."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f'{name} takes a number, got {value!r}')
    return float(value)


def check_depths(name: str, depths: Any) -> tuple[int, ...]:
    """Return a non-empty sequence of positive integers as a tuple."""
    if isinstance(depths, str) or not isinstance(depths, Sequence) or not depths:
        raise TypeError(f'{name} takes a non-empty sequence of integers, got {depths!r}')
    return tuple(check_integer(name, depth, minimum=1) for depth in depths)


def drop_path_schedule(drop_path_rate: float, depths: Sequence[int]) -> list[list[float]]:
    """Return the drop probabilities of each stage's blocks, rising linearly from 0 to ``drop_path_rate``."""
    drop_path_rate = check_number('drop_path_rate', drop_path_rate)
    if not 0.0 <= drop_path_rate < 1.0:
        raise ValueError(f'drop_path_rate must lie in [0, 1), got {drop_path_rate!r}')
    rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device='cpu').tolist())
    return [[next(rates) for _ in range(depth)] for depth in depths]
