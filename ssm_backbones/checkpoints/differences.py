"""Compare a checkpoint's tensors with a model's, by our names, before anything is loaded."""

from __future__ import annotations

import copy
import re
from collections import namedtuple
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from ssm_backbones.backbones.base import SSMBackbone
from ssm_backbones.checkpoints.naming import Shape, Shapes
from ssm_backbones.layers.token_grid import TokenGrid

_SHOWN = 5
# Parts that differ between the backbones of classifiers and detectors.
OUTPUT = re.compile(r'norm\d+|pyramid')
_IncompatibleKeys = namedtuple('_IncompatibleKeys', ['missing_keys', 'unexpected_keys'])


class Mismatch(NamedTuple):
    """A tensor that is missing from a checkpoint, unexpected in it, or of another shape than the model's."""

    name: str
    kind: Literal['missing', 'unexpected', 'shape']
    found: Shape | None
    """The shape in the checkpoint; None for a missing tensor."""
    expected: Shape | None
    """The shape in the model; None for an unexpected tensor."""


class Fit(NamedTuple):
    """Result of the comparison of a checkpoint's tensors with a module."""

    tensors: dict[str, Tensor]
    """Tensors to load: without parts that the backbone was built without, and with resized position embeddings."""
    initial: list[str]
    """Output norms and pyramid of a backbone that are entirely missing from the checkpoint."""
    mismatches: list[Mismatch]
    """Mismatches of all other tensors."""


def fit(module: nn.Module, tensors: Mapping[str, Tensor], resize: bool = True) -> Fit:
    """Compare a checkpoint's tensors with a module by names and shapes, without loading.

    The outputs of a backbone of this package depend on its use: a classifier has one output norm, a pyramid has its own
    norms. These may be missing; everything else has to match. In any other module everything has to match, after the
    module's own loading code has renamed or resized tensors.

    Args:
        module: A backbone, another part of a model, or a whole model.
        tensors: Tensors by name relative to the module.
        resize: Whether position embeddings may be resized; False when resuming, because the optimizer's state has the
            saved shape.
    """
    tensors = dict(tensors)
    if resize:
        for name, part in module.named_modules():
            if isinstance(part, TokenGrid):
                part.resize_saved(tensors, f'{name}.' if name else '')
    if isinstance(module, SSMBackbone):
        return _fit_backbone(module, tensors)
    expected = shapes_of(module.state_dict())
    mismatches = compare(shapes_of(_as_loaded(module, tensors)), expected)
    if not resize:
        named = {mismatch.name for mismatch in mismatches}
        raw = compare(shapes_of(tensors), {name: shape for name, shape in expected.items() if name in tensors})
        mismatches += [m for m in raw if m.kind == 'shape' and m.name not in named]
    return Fit(tensors, [], _without_what_is_excused(module, mismatches))


def compare(found: Shapes, expected: Shapes) -> list[Mismatch]:
    """Return the mismatches between the shapes of named tensors: expected names in order, then unexpected ones."""
    mismatches = []
    for name, shape in expected.items():
        if name not in found:
            mismatches.append(Mismatch(name, 'missing', None, shape))
        elif found[name] != shape:
            mismatches.append(Mismatch(name, 'shape', found[name], shape))
    return mismatches + [Mismatch(name, 'unexpected', found[name], None) for name in found if name not in expected]


def shapes_of(tensors: Mapping[str, Any]) -> dict[str, Shape]:
    """Return the shapes of the entries that are tensors."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items() if isinstance(tensor, Tensor)}


def explain(mismatches: Sequence[Mismatch], prefix: str = '') -> str:
    """Describe the first mismatches and count the others, for an error message.

    Args:
        mismatches: At least one mismatch.
        prefix: Prefix of the names.
    """
    return shorten([f'{prefix}{_explain_one(mismatch)}' for mismatch in mismatches])


def shorten(items: Sequence[str], separator: str = '; ') -> str:
    """Join the first few items and count the others."""
    more = len(items) - _SHOWN
    return separator.join(items[:_SHOWN]) + (f'{separator}and {more} more' if more > 0 else '')


def shape_text(shape: Sequence[int]) -> str:
    """Format a shape for messages, e.g. (64, 3, 3, 3)."""
    return f'({", ".join(map(str, shape))})'


def _explain_one(mismatch: Mismatch) -> str:
    if mismatch.expected is None:
        return f'{mismatch.name} is not expected'
    if mismatch.found is None:
        return f'{mismatch.name} {shape_text(mismatch.expected)} is missing'
    return f'{mismatch.name} is {shape_text(mismatch.found)}, expected {shape_text(mismatch.expected)}'


def _fit_backbone(backbone: SSMBackbone, tensors: dict[str, Tensor]) -> Fit:
    tensors = {name: tensor for name, tensor in tensors.items() if not backbone.leaves_out(name)}
    expected = shapes_of(backbone.state_dict())
    outputs = {part for name in expected if OUTPUT.fullmatch(part := name.partition('.')[0])}
    initial = sorted(outputs - {name.partition('.')[0] for name in tensors})
    expected = {name: shape for name, shape in expected.items() if name.partition('.')[0] not in initial}
    return Fit(tensors, initial, compare(shapes_of(tensors), expected))


def _as_loaded(module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Apply the renaming and resizing that parts of a module do on loading.

    It runs on copies of these parts with copied parameters, so that nothing is loaded. Backbones of this package are
    skipped.
    """
    state = dict(tensors)
    for path, part in module.named_modules():
        if not _changes_what_it_loads(part):
            continue
        prefix = f'{path}.' if path else ''
        below = {name: state.pop(name) for name in [*state] if name.startswith(prefix)}
        twin = copy.copy(part)
        for kind in ('_parameters', '_buffers'):
            own = getattr(part, kind)
            setattr(
                twin, kind, {name: tensor if tensor is None else copy.deepcopy(tensor) for name, tensor in own.items()}
            )
        twin._load_from_state_dict(below, prefix, {}, True, [], [], [])
        state.update(below)
    return state


def _changes_what_it_loads(module: nn.Module) -> bool:
    if isinstance(module, (SSMBackbone, TokenGrid)):
        return False
    # PyTorch's own overrides, such as that of batch norms, only add counters.
    overridden = not type(module)._load_from_state_dict.__module__.startswith('torch.')
    return overridden or bool(module._load_state_dict_pre_hooks)


def _without_what_is_excused(module: nn.Module, mismatches: list[Mismatch]) -> list[Mismatch]:
    """Drop missing counters of batch norms, and mismatches that the modules' load hooks accept, as adapters' do."""
    missing = [m.name for m in mismatches if m.kind == 'missing' and not m.name.endswith('num_batches_tracked')]
    unexpected = [m.name for m in mismatches if m.kind == 'unexpected']
    for part in module.modules():
        for hook in part._load_state_dict_post_hooks.values():
            hook(part, _IncompatibleKeys(missing, unexpected))
    left = {*missing, *unexpected}
    return [mismatch for mismatch in mismatches if mismatch.kind == 'shape' or mismatch.name in left]
