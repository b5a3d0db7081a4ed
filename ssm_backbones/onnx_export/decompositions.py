"""Decompositions of the scans into standard operators around a plain first-order recurrence.

``cuda_ops::route_scan`` and ``cuda_ops::wavefront_scan`` are rewritten for :func:`torch.export` programs as elementwise
arithmetic and two recurrences over a leading dimension. Either they are custom operators, exported as ONNX's standard
``Scan``, or PyTorch's own operators without a loop (:mod:`ssm_backbones.onnx_export.loop_free`)::

    ssm_export::line    h_l = decay_l * h_{l-1} + inflow_l
    ssm_export::front   h_l[i] = left_l[i] * h_{l-1}[i] + top_l[i] * h_{l-1}[i-1] + inflow_l[i]

The first one may also go from the end, ``h_l = decay_l * h_{l+1} + inflow_l``. The second one iterates over the
anti-diagonals of a map; i is the row. All lengths may be dynamic.
Decay, inflow and states of all positions are materialised, (positions, channels, states) for each route.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._decomp import get_decompositions
from torch.nn import functional as F

from cuda_ops.route_reference import COLUMN, COLUMN_REVERSED, ROW, ROW_REVERSED, low_rank_delta
from ssm_backbones.onnx_export import loop_free

# The routes that go the other way.
_FORWARD = {ROW_REVERSED: ROW, COLUMN_REVERSED: COLUMN}

_LIBRARY = torch.library.Library('ssm_export', 'DEF')
_LIBRARY.define('line(Tensor decay, Tensor inflow, bool reverse=False) -> Tensor')
_LIBRARY.define('front(Tensor left, Tensor top, Tensor inflow) -> Tensor')


@torch.library.impl('ssm_export::line', 'CompositeExplicitAutograd', lib=_LIBRARY)
def line(decay: Tensor, inflow: Tensor, reverse: bool = False) -> Tensor:
    """Compute ``h_l = decay_l * h_{l-1} + inflow_l`` along dim 0 from zero, or of ``h_{l+1}``; all (L, ...)."""
    states = torch.empty_like(inflow)
    state = torch.zeros_like(inflow[0])
    positions = range(inflow.shape[0])
    for position in reversed(positions) if reverse else positions:
        state = decay[position] * state + inflow[position]
        states[position] = state
    return states


@torch.library.impl('ssm_export::front', 'CompositeExplicitAutograd', lib=_LIBRARY)
def front(left: Tensor, top: Tensor, inflow: Tensor) -> Tensor:
    """Compute ``h_l[i] = left_l[i] * h_{l-1}[i] + top_l[i] * h_{l-1}[i-1] + inflow_l[i]``; all (L, I, ...)."""
    states = torch.empty_like(inflow)
    state = torch.zeros_like(inflow[0])
    for position in range(inflow.shape[0]):
        above = torch.cat([torch.zeros_like(state[:1]), state[:-1]])
        state = left[position] * state + top[position] * above + inflow[position]
        states[position] = state
    return states


@torch.library.register_fake('ssm_export::line', lib=_LIBRARY)
def _(decay: Tensor, inflow: Tensor, reverse: bool = False) -> Tensor:
    return torch.empty_like(inflow, memory_format=torch.contiguous_format)


@torch.library.register_fake('ssm_export::front', lib=_LIBRARY)
def _(left: Tensor, top: Tensor, inflow: Tensor) -> Tensor:
    return torch.empty_like(inflow, memory_format=torch.contiguous_format)


def route_scan(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor | None,
    C: Tensor | None,
    D: Tensor | None,
    delta_bias: Tensor | None,
    routes: list[int],
    per_line: bool,
    delta_softplus: bool,
    chunk: int,
    delta_weight: Tensor | None = None,
    *,
    line: Callable[[Tensor, Tensor, bool], Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Decompose ``cuda_ops::route_scan`` for inference in float32; same arguments and results, but no saved states.

    ``line`` computes the recurrence of (L, K, M) along L, or from its end.

    Raises:
        NotImplementedError: If there are groups of channels, which no backbone uses.
    """
    B, C = of_one_group(B), of_one_group(C)
    height, width = x.shape[1:3]
    if delta_weight is not None:
        delta = low_rank_delta(delta, delta_weight)
    d = delta.float() if delta_bias is None else delta.float() + delta_bias
    d = F.softplus(d) if delta_softplus else d
    u = x.float()
    # Where all routes are reversed, as a line's, the recurrence starts at their end in place of a reversal of its input
    # and output, at which MNN 3.6.1 fails.
    reverse = all(route in _FORWARD for route in routes)
    if reverse:
        routes = [_FORWARD[route] for route in routes]
    # By route, so that nothing has more than five dimensions; one recurrence serves all of them, (positions, routes,
    # elements).
    decays, inflows = [], []
    for k, route in enumerate(routes):
        d_k = d[:, :, :, k]
        inflow = (d_k * u).unsqueeze(4)
        inflow = inflow.expand(-1, -1, -1, -1, A.shape[2]) if B is None else inflow * B[:, :, :, k].float().unsqueeze(3)
        decays.append(_along(torch.exp(d_k.unsqueeze(4) * A[k]), route, per_line))
        inflows.append(_along(inflow, route, per_line))
    shape = inflows[0].shape
    decay, inflow = (torch.stack([value.flatten(1) for value in values], 1) for values in (decays, inflows))
    sequences = line(decay, inflow, reverse)
    output = u * D.sum(0) if D is not None else torch.zeros_like(u)
    lasts = []
    for k, route in enumerate(routes):
        states = sequences[:, k].reshape(shape)
        on_grid = _back(states, route, per_line, height, width)
        weighted = on_grid if C is None else on_grid * C[:, :, :, k].float().unsqueeze(3)
        output = output + weighted.sum(-1)
        lasts.append(states[0 if reverse else -1])
    nothing = x.new_empty((0,), dtype=torch.float32)
    return output.to(x.dtype), nothing if per_line else torch.stack(lasts, 1), nothing


def of_one_group(projection: Tensor | None) -> Tensor | None:
    """Return a projection without its axis of groups, (B, H, W, K, N).

    Raises:
        NotImplementedError: If there are groups of channels, which no backbone uses.
    """
    if projection is None or projection.dim() == 5:
        return projection
    if projection.shape[4] != 1:
        raise NotImplementedError('only scans with one group of channels are exported')
    return projection.squeeze(4)


def wavefront_scan(
    x: Tensor,
    delta_top: Tensor,
    delta_left: Tensor,
    A_top: Tensor,
    A_left: Tensor,
    B_top: Tensor,
    B_left: Tensor,
    C: Tensor,
    D: Tensor | None,
    reverse: bool,
    chunk: int,
    *,
    front: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Decompose ``cuda_ops::wavefront_scan`` for inference in float32; same arguments, but no saved states.

    ``front`` computes the recurrence along the anti-diagonals of (L, I, B, E, N).
    """
    height, width = x.shape[1], x.shape[2]
    maps = [value.float() for value in (x, delta_top, delta_left, B_top, B_left, C)]
    if reverse:
        maps = [value.flip(1, 2) for value in maps]
    u, d_top, d_left, b_top, b_left, c = maps
    rows = torch.arange(height, device=x.device)[:, None]
    columns = torch.arange(width, device=x.device)[None]
    # Two neighbours count half each, a single one counts whole; the first pixel has the left inflow.
    top = (rows > 0).float() * torch.where(columns > 0, 0.5, 1.0)
    top, left = top[..., None, None], (1.0 - top)[..., None, None]
    decay_top = top * torch.exp(d_top.unsqueeze(4) * A_top)
    decay_left = left * torch.exp(d_left.unsqueeze(4) * A_left)
    inflow = top * (d_top * u).unsqueeze(4) * b_top.unsqueeze(3)
    inflow = inflow + left * (d_left * u).unsqueeze(4) * b_left.unsqueeze(3)
    states = front(*(_skew(value) for value in (decay_left, decay_top, inflow)))
    y = (_unskew(states, width) * c.unsqueeze(3)).sum(4)
    if D is not None:
        y = y + D * u
    y = y.flip(1, 2) if reverse else y
    nothing = x.new_empty((0,), dtype=torch.float32)
    return y.to(x.dtype), nothing, nothing


def replacements(loops: bool = True) -> dict[Any, Callable[..., Any]]:
    """Map the scans to their decompositions, for :class:`ssm_backbones.onnx_export.override.FunctionOverrideMode`.

    Args:
        loops: Whether each recurrence is one custom operator, for ONNX's ``Scan``, instead of unrolled operators
            (:mod:`ssm_backbones.onnx_export.loop_free`).
    """
    along = torch.ops.ssm_export.line if loops else loop_free.line
    across = torch.ops.ssm_export.front if loops else loop_free.front
    return {
        torch.ops.cuda_ops.route_scan: partial(route_scan, line=along),
        torch.ops.cuda_ops.wavefront_scan: partial(wavefront_scan, front=across),
    }


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Return the scans' decompositions without loops, for ``torch.export.ExportedProgram.run_decompositions``.

    With them come those of operators that some converters do not take, or misread: ``aten.lerp``, ``aten.alias``,
    ``aten.upsample_nearest2d`` of fixed sizes by no whole factor, and ``aten.convolution`` of one dimension.

    The programs hold PyTorch's own operators alone afterwards, which any backend takes, on tensors of at most five
    dimensions. Scans compute in float32, whatever a program's dtype. The batch may be open, and height and width with
    an upper bound, ``torch.export.Dim('height', max=512)``; without one NotImplementedError is raised. A scan along
    routes or lines then takes some 60 operators for each factor of 8 in the bound of its length, a wavefront scan 6 for
    each of its ``H + W - 1`` steps at the largest map, which are computed for smaller maps, too. Add the table to that
    of PyTorch's own decompositions::

        program = torch.export.export(model, (images,))
        program = program.run_decompositions({**torch.export.default_decompositions(), **decompositions()})
    """
    scans: dict[Any, Callable[..., Any]] = {
        operator.default: function for operator, function in replacements(loops=False).items()
    }
    aten = torch.ops.aten
    return {
        **scans,
        # PyTorch would decompose V2M's mean of two directions into two formulas and a choice between them by a scalar.
        # Core ML's converter (coremltools 9.0) has no conversion of that, nor of views of a whole tensor.
        aten.lerp.Scalar: _lerp,
        aten.alias.default: lambda x: x,
        aten.upsample_nearest2d.vec: _upsample_nearest,
        aten.convolution.default: _convolution,
    }


def _upsample_nearest(x: Tensor, output_size: list[int] | None, scale_factors: list[float] | None) -> Tensor:
    """Compute ``aten.upsample_nearest2d.vec`` of fixed sizes by indices where a factor is not whole.

    An FPN has such factors where an image's sides are no multiples of its largest stride. LiteRT's converter
    (litert-torch 0.10.0) would take other pixels than PyTorch there.
    """
    sides = x.shape[2:]
    if not all(type(side) is int for side in (*sides, *(output_size or ()))):
        return NotImplemented  # the operator stays
    size = output_size or [int(side * factor) for side, factor in zip(sides, scale_factors or (), strict=True)]
    factors = scale_factors or [new / side for side, new in zip(sides, size, strict=True)]
    if all(float(factor).is_integer() for factor in factors):
        return NotImplemented
    # PyTorch's kernel takes no notice of a factor by which a side stays or doubles.
    scales = [
        None if scale_factors is None or new in (side, 2 * side) else factor
        for side, new, factor in zip(sides, size, factors, strict=True)
    ]
    operator = torch.ops.aten.upsample_nearest2d.default
    return get_decompositions([operator])[operator](x, size, *scales)


def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Tensor:
    """Compute ``aten.convolution`` of one dimension in two.

    The plain V2M's directions share their weights. ExecuTorch's XNNPACK (1.5.1) fails where two convolutions in one
    dimension do.
    """
    if x.ndim != 3:
        return NotImplemented  # the operator stays
    y = torch.ops.aten.convolution.default(
        x.unsqueeze(-2),
        weight.unsqueeze(-2),
        bias,
        [1, *stride],
        [0, *padding],
        [1, *dilation],
        transposed,
        [0, *output_padding],
        groups,
    )
    return y.squeeze(-2)


def _lerp(start: Tensor, end: Tensor, weight: float) -> Tensor:
    """Compute ``aten.lerp.Scalar`` by the formula that it takes for the weight, half precision in float32."""
    dtype = start.dtype
    if dtype in (torch.float16, torch.bfloat16):
        start, end = start.float(), end.float()
    step = end - start
    return (start + weight * step if abs(weight) < 0.5 else end - step * (1 - weight)).to(dtype)


def _along(grid: Tensor, route: int, per_line: bool) -> Tensor:
    """Reorder (B, H, W, ...) along a route: (positions, B, ...), or, not reversed, (positions, B, lines, ...).

    Positions are reversed where they are no first dimension, here and in :func:`_back`: MNN 3.6.1 fails otherwise.
    """
    column, reverse = route in (COLUMN, COLUMN_REVERSED), route in (ROW_REVERSED, COLUMN_REVERSED)
    if per_line:
        return grid.movedim(1 if column else 2, 0)
    sequence = (grid.transpose(1, 2) if column else grid).flatten(1, 2)
    return (sequence.flip(1) if reverse else sequence).transpose(0, 1)


def _back(sequence: Tensor, route: int, per_line: bool, height: int, width: int) -> Tensor:
    """Invert :func:`_along`: (positions, ...) -> (B, H, W, ...).

    It is copied, since a program of open sizes would otherwise hold which strides of the example were the larger ones.
    """
    column, reverse = route in (COLUMN, COLUMN_REVERSED), route in (ROW_REVERSED, COLUMN_REVERSED)
    if per_line:
        return sequence.movedim(0, 1 if column else 2).contiguous()
    grid = sequence.transpose(0, 1)
    grid = (grid.flip(1) if reverse else grid).unflatten(1, (width, height) if column else (height, width))
    return (grid.transpose(1, 2) if column else grid).contiguous()


def _skew(grid: Tensor) -> Tensor:
    """Shift row i right by i, (B, H, W, E, N) -> (H + W - 1, H, B, E, N), so that anti-diagonals become columns."""
    batch, height, width, channels, states = grid.shape
    padded = F.pad(grid, (0, 0, 0, 0, 0, height)).flatten(1, 2)
    # Reading rows that are one pixel shorter shifts each row right by one relative to the row above.
    skewed = padded[:, : height * (height + width - 1)].reshape(batch, height, height + width - 1, channels, states)
    return skewed.permute(2, 1, 0, 3, 4).contiguous()


def _unskew(skewed: Tensor, width: int) -> Tensor:
    """Invert :func:`_skew`."""
    _, height, batch, channels, states = skewed.shape
    flat = skewed.permute(2, 1, 0, 3, 4).flatten(1, 2)
    padded = F.pad(flat, (0, 0, 0, 0, 0, height))
    return padded.reshape(batch, height, height + width, channels, states)[:, :, :width]
