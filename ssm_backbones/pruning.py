"""Torch-Pruning on the backbones: what it is to take for one layer.

Torch-Pruning follows gradient functions to find which layers share channels, and takes dimension 1 of a map for the
channels. In a mixer, whose maps are channel-last and whose scan relates all of its inputs, that search does not end:
from pass to pass it finds more channels, ever greater ones. So while Torch-Pruning traces a model, one layer stands for
everything between a mixer's first and its last projection. Channels that the mixer takes and gives are pruned with the
blocks', the inner ones stay.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ssm_backbones.backbones.mamba2d import ScaledResidual
from ssm_backbones.backbones.v2m import PlainV2M
from ssm_backbones.compat import within_torch_pruning
from ssm_backbones.layers.common import PatchMerging
from ssm_backbones.layers.mamba2d_mixer import RotaryAttention, ScanMixer
from ssm_backbones.layers.ss2d import SS2D
from ssm_backbones.layers.token_grid import TokenGrid
from ssm_backbones.layers.v2m_mixer import HierarchicalV2MMixer, PlainV2MMixer
from ssm_backbones.utils.torch_compat import RMSNorm


class _Between(nn.Module):
    """Stands for what a part computes between layers that Torch-Pruning prunes.

    Args:
        part: The part.
    """

    def __init__(self, part: Any) -> None:
        super().__init__()
        # Not as a submodule, which the part would be of itself.
        self.__dict__['part'] = part

    def forward(self, x: Tensor, *shape: int) -> Tensor:
        return _OneNode.apply(x, shape)


class _Inner(_Between):
    """What is between the projections of a mixer."""


class _Merging(_Between):
    """The norm of :class:`PatchMerging`, and that it takes the channels of four pixels."""


class _Positions(_Between):
    """The position embedding of :class:`TokenGrid`."""


class _OneNode(torch.autograd.Function):
    """One node among the gradient functions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        return x.new_zeros(shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise RuntimeError('Torch-Pruning traces the model without its gradients')


def _trace_mixer(part: Any, x: Tensor) -> Tensor:
    first, last = (part.qkv, part.proj) if isinstance(part, RotaryAttention) else (part.in_proj, part.out_proj)
    y: Tensor = last(part.between(first(x), *x.shape[:3], last.in_features))
    return y + part.local(x) if isinstance(part, ScanMixer) else y


def _trace_merging(part: Any, x: Tensor) -> Tensor:
    height, width = ((side + 1) // 2 for side in x.shape[1:3])
    y: Tensor = part.reduction(part.between(x, x.shape[0], height, width, part.reduction.in_features))
    return y


def _trace_tokens(part: Any, x: Tensor) -> Tensor:
    x = super(TokenGrid, part).forward(x)
    y: Tensor = part.between(x, *x.shape)
    return y


_PARTS: dict[type[nn.Module], tuple[type[_Between], Callable[[Any, Tensor], Tensor]]] = {
    SS2D: (_Inner, _trace_mixer),
    PlainV2MMixer: (_Inner, _trace_mixer),
    HierarchicalV2MMixer: (_Inner, _trace_mixer),
    ScanMixer: (_Inner, _trace_mixer),
    RotaryAttention: (_Inner, _trace_mixer),
    PatchMerging: (_Merging, _trace_merging),
    TokenGrid: (_Positions, _trace_tokens),
}


class _Pruner:
    """A customised pruner of Torch-Pruning, of a layer whose inputs and outputs are the same channels.

    Args:
        name: Name of the parameter (..., C), in the layer or the part that it stands for.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.pruning_dim = -1

    def owner(self, layer: Any) -> Any:
        return layer.part if isinstance(layer, _Between) else layer

    def prune_out_channels(self, layer: Any, idxs: list[int]) -> Any:
        owner = self.owner(layer)
        parameter = owner.get_parameter(self.name)
        kept = sorted(set(range(parameter.shape[-1])) - set(idxs))
        setattr(owner, self.name, nn.Parameter(parameter.detach()[..., kept], parameter.requires_grad))
        if isinstance(owner, RMSNorm):
            owner.normalized_shape = (len(kept),)
        return layer

    prune_in_channels = prune_out_channels

    def get_out_channels(self, layer: Any) -> Any:
        return self.owner(layer).get_parameter(self.name).shape[-1]

    get_in_channels = get_out_channels

    def get_in_channel_groups(self, layer: Any) -> int:
        return 1

    get_out_channel_groups = get_in_channel_groups


class _MergingPruner(_Pruner):
    """Prunes the norm and the projection of patch merging, which take four pixels one after the other."""

    def __init__(self, package: ModuleType) -> None:
        super().__init__('')
        self.package = package

    def prune_in_channels(self, layer: Any, idxs: list[int]) -> Any:
        channels = self.get_in_channels(layer)
        everywhere = [pixel * channels + i for pixel in range(4) for i in idxs]
        self.package.prune_layernorm_out_channels(layer.part.norm, everywhere)
        self.package.prune_linear_in_channels(layer.part.reduction, everywhere)
        return layer

    def prune_out_channels(self, layer: Any, idxs: list[int]) -> Any:
        raise ValueError('prune the channels that patch merging takes, not its four pixels')

    def get_in_channels(self, layer: Any) -> Any:
        return layer.part.reduction.in_features // 4

    def get_out_channels(self, layer: Any) -> Any:
        return layer.part.reduction.in_features


class _InnerPruner(_Pruner):
    """Refuses the inner channels of a mixer."""

    def prune_in_channels(self, layer: Any, idxs: list[int]) -> Any:
        raise ValueError(_KEPT)

    def prune_out_channels(self, layer: Any, idxs: list[int]) -> Any:
        raise ValueError(_KEPT)

    def get_out_channels(self, layer: Any) -> Any:
        return None

    get_in_channels = get_out_channels


_KEPT = (
    'the inner channels of a mixer, which its scan and its projections share, cannot be pruned by Torch-Pruning. '
    'Choose a layer outside of the mixer, whose channels it takes or gives, or build the model with a lower ssm_ratio'
)


@contextlib.contextmanager
def _parts_as_layers(package: ModuleType, graph: Any, model: nn.Module) -> Iterator[None]:
    """Have Torch-Pruning build its graph of a model that may contain backbones."""
    parts: list[Any] = [module for module in model.modules() if type(module) in _PARTS]
    if not parts:
        yield
        return
    for module in model.modules():
        if isinstance(module, PlainV2M):
            _check_plain(module)
    pruners: dict[type[nn.Module], _Pruner] = {
        RMSNorm: _Pruner('weight'),
        ScaledResidual: _Pruner('scale'),
        _Positions: _Pruner('pos_embed'),
        _Merging: _MergingPruner(package),
        _Inner: _InnerPruner(''),
    }
    for kind, pruner in pruners.items():
        graph.CUSTOMIZED_PRUNERS.setdefault(kind, pruner)
        graph.register_customized_layer(kind, graph.CUSTOMIZED_PRUNERS[kind])
    forwards = {part: vars(part).get('forward') for part in parts}
    try:
        for part in parts:
            kind, trace = _PARTS[type(part)]
            part.between = kind(part)
            part.forward = functools.partial(trace, part)
        yield
    finally:
        for part, forward in forwards.items():
            del part.between, part.forward
            if forward is not None:
                part.forward = forward
    inside = {layer for part in parts if _PARTS[type(part)][0] is _Inner for layer in part.modules()}
    # Searches for groups pass over them; it is too late for the tracing to.
    graph.IGNORED_LAYERS_IN_TRACING.extend(
        part.in_proj if hasattr(part, 'in_proj') else part.qkv for part in inside & set(parts)
    )
    search = graph.get_pruning_group

    def get_pruning_group(module: nn.Module, pruning_fn: Any, idxs: Any) -> Any:
        if module in inside and module not in graph.module2node:
            raise ValueError(_KEPT)
        group = search(module, pruning_fn, idxs)
        if any(isinstance(item[0].target.module, _Inner) for item in group):
            raise ValueError(_KEPT)
        return group

    graph.get_pruning_group = get_pruning_group


def _check_plain(backbone: PlainV2M) -> None:
    if backbone.patch_embed.cls_token is not None:
        raise ValueError(
            'Torch-Pruning would take the row that class tokens add for a channel; build the backbone with '
            "cls_token='mean'"
        )
    if backbone.pyramid is not None:
        raise ValueError(
            'Torch-Pruning would take the rows that the pyramid crops for channels; build the backbone with '
            'pyramid=None, prune it, and put a pyramid behind it'
        )


within_torch_pruning(_parts_as_layers)
