"""The two recurrences of :mod:`ssm_backbones.onnx_export.decompositions` without loops, for fixed sizes.

A sequence is cut into chunks, whose positions are unrolled: a first pass over them gives each chunk's state from zero
and the product of its decays, the same recurrence on these the state before each chunk, and a second pass all states.
Decays are multiplied as they are: nothing overflows that the recurrence itself does not. A wavefront is unrolled.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

# Positions of a chunk, which takes five operators for each, and those that are unrolled without chunks, by two.
_CHUNK, _UNROLLED = 8, 32


def line(decay: Tensor, inflow: Tensor) -> Tensor:
    """Compute ``h_l = decay_l * h_{l-1} + inflow_l`` along dim 0 from zero; both are (L, ...).

    Raises:
        NotImplementedError: If L is dynamic.
    """
    _check_fixed(inflow)
    length = inflow.shape[0]
    if length <= _UNROLLED:
        return torch.stack(_unroll(decay.unbind(0), inflow.unbind(0), torch.zeros_like(inflow[0])))
    chunks = -(-length // _CHUNK)
    missing = chunks * _CHUNK - length
    shape, decay, inflow = inflow.shape, decay.flatten(1), inflow.flatten(1)
    if missing:
        decay, inflow = F.pad(decay, (0, 0, 0, missing)), F.pad(inflow, (0, 0, 0, missing))
    decays = decay.reshape(chunks, _CHUNK, -1).unbind(1)
    inflows = inflow.reshape(chunks, _CHUNK, -1).unbind(1)
    whole = decays[0]
    for each in decays[1:]:
        whole = whole * each
    ends = line(whole, _unroll(decays, inflows, torch.zeros_like(whole))[-1])
    before = F.pad(ends[:-1], (0, 0, 1, 0))
    states = torch.stack(_unroll(decays, inflows, before), dim=1).flatten(0, 1)
    return (states[:length] if missing else states).reshape(shape)


def front(left: Tensor, top: Tensor, inflow: Tensor) -> Tensor:
    """Compute ``h_l[i] = left_l[i] * h_{l-1}[i] + top_l[i] * h_{l-1}[i-1] + inflow_l[i]``; all (L, I, ...).

    Raises:
        NotImplementedError: If L is dynamic.
    """
    _check_fixed(inflow)
    state = inflow[0]
    states = [state]
    for a, b, c in zip(left.unbind(0)[1:], top.unbind(0)[1:], inflow.unbind(0)[1:], strict=True):
        # The row above the first one is zero.
        above = torch.cat([torch.zeros_like(state[:1]), state[:-1]])
        state = state * a + above * b + c
        states.append(state)
    return torch.stack(states)


def _unroll(decays: Sequence[Tensor], inflows: Sequence[Tensor], state: Tensor) -> list[Tensor]:
    states = []
    for decay, inflow in zip(decays, inflows, strict=True):
        state = state * decay + inflow
        states.append(state)
    return states


def _check_fixed(inflow: Tensor) -> None:
    if not isinstance(inflow.shape[0], int):
        raise NotImplementedError('scans of open sizes need loops; export without loops for one size of images')
