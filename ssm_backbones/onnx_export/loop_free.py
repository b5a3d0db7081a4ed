"""The two recurrences of :mod:`ssm_backbones.onnx_export.decompositions` without loops.

A sequence is cut into chunks, whose positions are unrolled: a first pass over them gives each chunk's state from zero
and the product of its decays, the same recurrence on these the state before each chunk, and a second pass all states.
Decays are multiplied as they are: nothing overflows that the recurrence itself does not. A wavefront is unrolled.

An open length needs an upper bound, by which it is unrolled; positions behind the end have a decay and an inflow of 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# Positions of a chunk, which takes five operators for each, and those that are unrolled without chunks, by two.
_CHUNK, _UNROLLED = 8, 32
# Bounds from here on are those of PyTorch for sizes that have none.
_NO_BOUND = 2**31


def line(decay: Tensor, inflow: Tensor, reverse: bool = False) -> Tensor:
    """Compute ``h_l = decay_l * h_{l-1} + inflow_l`` along dim 0 from zero; both are (L, ...).

    With ``reverse`` it goes from the end, ``h_l = decay_l * h_{l+1} + inflow_l``, and nothing is reversed in memory.

    Raises:
        NotImplementedError: If L is dynamic and has no upper bound.
    """
    shape = inflow.shape
    return _line(decay.flatten(1), inflow.flatten(1), _bound(_length(inflow)), reverse).reshape(shape)


def _line(decay: Tensor, inflow: Tensor, bound: int, reverse: bool) -> Tensor:
    """Compute :func:`line` of (L, M), where L is at most ``bound``."""
    length = _length(inflow)
    order = slice(None, None, -1 if reverse else 1)
    if bound <= _UNROLLED:
        decays, inflows = (_extended(value, bound).unbind(0)[order] for value in (decay, inflow))
        return _cut(torch.stack(_unroll(decays, inflows, torch.zeros_like(inflow[0]))[order]), length)
    if isinstance(length, int):
        chunks, most = -(-length // _CHUNK), -(-bound // _CHUNK)
    else:
        # Never a single one, which PyTorch would take for a special case that a program of other lengths does not fit.
        chunks, most = length // _CHUNK + 2, bound // _CHUNK + 2
    decays, inflows = (
        _extended(value, chunks * _CHUNK, 2 * _CHUNK).reshape(chunks, _CHUNK, value.shape[1]).unbind(1)[order]
        for value in (decay, inflow)
    )
    whole = decays[0]
    for each in decays[1:]:
        whole = whole * each
    ends = _line(whole, _unroll(decays, inflows, torch.zeros_like(whole))[-1], most, reverse)
    before = F.pad(ends, (0, 0, 0, 1))[1:] if reverse else F.pad(ends, (0, 0, 1, 0))[:-1]
    return _cut(torch.stack(_unroll(decays, inflows, before)[order], dim=1).flatten(0, 1), length)


def front(left: Tensor, top: Tensor, inflow: Tensor) -> Tensor:
    """Compute ``h_l[i] = left_l[i] * h_{l-1}[i] + top_l[i] * h_{l-1}[i-1] + inflow_l[i]``; all (L, I, ...).

    Raises:
        NotImplementedError: If L is dynamic and has no upper bound.
    """
    length = _length(inflow)
    bound = _bound(length)
    left, top, inflow = (_extended(value, bound) for value in (left, top, inflow))
    state = inflow[0]
    states = [state]
    for a, b, c in zip(left.unbind(0)[1:], top.unbind(0)[1:], inflow.unbind(0)[1:], strict=True):
        # The row above the first one is zero.
        above = F.pad(state, (0, 0) * (state.ndim - 1) + (1, 0))[:-1]
        state = state * a + above * b + c
        states.append(state)
    return _cut(torch.stack(states), length)


def _unroll(decays: Sequence[Tensor], inflows: Sequence[Tensor], state: Tensor) -> list[Tensor]:
    states = []
    for decay, inflow in zip(decays, inflows, strict=True):
        state = state * decay + inflow
        states.append(state)
    return states


def _bound(size: Any) -> int:
    """Return a size, or the largest one that a dynamic size can have."""
    if isinstance(size, int):
        return size
    largest = size.node.shape_env.bound_sympy(size.node.expr).upper
    if not largest.is_Integer or largest >= _NO_BOUND:
        raise NotImplementedError(
            'scans of open sizes need an upper bound where there are no loops; give height and width one, '
            "as torch.export.Dim('height', max=512)"
        )
    return int(largest)


def _extended(value: Tensor, size: Any, most: int | None = None) -> Tensor:
    """Append rows of zeros to (L, ...) until there are ``size``, by at most ``most``.

    Without ``most`` an open length gets one row more than ``size``, its bound, which it then never has itself.
    """
    length = _length(value)
    if isinstance(length, int):
        if length == size:
            return value
        added = size - length
    else:
        # A number that does not depend on the length, since PyTorch takes a padding of none for a special case.
        size, added = (size + 1, size + 1) if most is None else (size, most)
    return _cut(F.pad(value, (0, 0) * (value.ndim - 1) + (0, added)), size)


def _cut(value: Tensor, length: Any) -> Tensor:
    present = _length(value)
    return value if isinstance(present, int) and present == length else value[:length]


def _length(value: Tensor) -> Any:
    length = value.shape[0]
    # Those that torch.jit.trace records are tensors, of fixed sizes.
    return length if isinstance(length, torch.SymInt) else int(length)
