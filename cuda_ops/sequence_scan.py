"""The selective scan over a sequence: a route over a grid of height 1, with all that Mamba's own function takes."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from cuda_ops import _checks
from cuda_ops._torch_compat import is_exporting
from cuda_ops.route_reference import ROW, state_dtype
from cuda_ops.route_scan import scan_routes


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Mamba's selective scan over a sequence, with the interface of Mamba's own function.

    See :mod:`cuda_ops.route_scan` for the equations. The kernels run channel-last: prefer :func:`line_scan` or
    :func:`cross_selective_scan` for maps, which need no transposition.

    Args:
        u: (B, E, L) sequence; float32, bfloat16 or float16 (float64 on CPU). L is at least 1.
        delta: (B, E, L), before bias and softplus, in u's dtype.
        A: (E, N) real decay rates, finite and not positive (checked on CPU).
        B: input projections: (B, N, L) or (B, G, N, L) with G dividing E in u's dtype, or constant (E, N), a parameter
            like A.
        C: output projections, in the same forms.
        D: (E) skip weights, or None for no skip.
        z: (B, E, L) gate in u's dtype: the output is multiplied by silu(z); or None.
        delta_bias: (E), or None.
        delta_softplus: whether delta + delta_bias passes a softplus.
        return_last_state: also return the state after the last position.

    Returns:
        (B, E, L) in u's dtype, and with ``return_last_state`` also (B, E, N) in float32 (float64 for float64 input).
        Both are differentiable once, in every floating input.

    Raises:
        ValueError: a shape does not fit, or A is positive or not finite.
        TypeError: dtypes are mixed or not supported.
    """
    _checks.tensors(u=u, delta=delta, A=A, B=B, C=C)
    _checks.tensors_or_none(D=D, z=z, delta_bias=delta_bias)
    _checks.ndim('u', u, 3, '(batch, channels, length)')
    batch, channels, length = u.shape
    _checks.ndim('A', A, 2, '(channels, states)')
    states = A.shape[1]
    _checks.shape('A', A, (channels, states), '(channels, states)')
    for name, value in (('delta', delta), ('z', z)):
        _checks.shape(name, value, (batch, channels, length), '(batch, channels, length)')
    for name, value in (('D', D), ('delta_bias', delta_bias)):
        _checks.shape(name, value, (channels,), '(channels,)')
    if length < 1:
        raise ValueError('u must hold at least one position, got length 0')
    _checks.states(A)
    B_sequence, B_constant = _sequence_projection('B', B, batch, channels, states, length)
    C_sequence, C_constant = _sequence_projection('C', C, batch, channels, states, length)
    u, delta, z, B_sequence, C_sequence = _checks.autocast(u, delta, z, B_sequence, C_sequence)
    _checks.same_dtype_and_device(u=u, delta=delta, z=z, B=B_sequence, C=C_sequence)
    _checks.same_device(u, A=A, B=B_constant, C=C_constant, D=D, delta_bias=delta_bias)
    if B_sequence is not None and C_sequence is not None and B_sequence.shape[2] != C_sequence.shape[2]:
        # Groups of one projection may be finer than the other's: bring both to the finer common division.
        groups = math.lcm(B_sequence.shape[2], C_sequence.shape[2])
        B_sequence, C_sequence = (
            value.repeat_interleave(groups // value.shape[2], dim=2) for value in (B_sequence, C_sequence)
        )
    B_sequence, C_sequence = (None if value is None else _on_grid(value) for value in (B_sequence, C_sequence))
    x, delta = u.transpose(1, 2).unsqueeze(1), delta.transpose(1, 2)[:, None, :, None]
    A = A.unsqueeze(0)
    bias = None if delta_bias is None else delta_bias.unsqueeze(0)
    skip = None if D is None else D.unsqueeze(0)
    if B_constant is None and C_constant is None:
        y, last = scan_routes(x, delta, A, B_sequence, C_sequence, skip, bias, [ROW], False, delta_softplus)
    else:
        y, last = _scan_by_state(
            x, delta, A, B_sequence, C_sequence, skip, bias, delta_softplus, B_constant, C_constant
        )
    y = y.squeeze(1).transpose(1, 2)
    if z is not None:
        y = y * F.silu(z)
    return (y, last.squeeze(1)) if return_last_state else y


def _sequence_projection(
    name: str, value: Tensor, batch: int, channels: int, states: int, length: int
) -> tuple[Tensor | None, Tensor | None]:
    """Bring B or C to (B, L, G, N), or return it as the constant (E, N) that it is."""
    if value.dim() == 2:
        _checks.shape(name, value, (channels, states), '(channels, states)')
        return None, value
    if value.dim() == 3:
        _checks.shape(name, value, (batch, states, length), '(batch, states, length)')
        value = value.unsqueeze(1)
    _checks.ndim(name, value, 4, '(channels, states), (batch, states, length) or (batch, groups, states, length)')
    groups = value.shape[1]
    _checks.shape(name, value, (batch, groups, states, length), '(batch, groups, states, length)')
    if groups < 1 or channels % groups:
        raise ValueError(f'{name} has {groups} groups, which do not divide the {channels} channels')
    return value.permute(0, 3, 1, 2), None


def _on_grid(projection: Tensor) -> Tensor:
    """Bring (B, L, G, N) to the operator's (B, 1, L, 1, G, N), without an axis of one group as :func:`grouped` does."""
    if projection.shape[2] == 1 and is_exporting():
        projection = projection.squeeze(2)
    return projection[:, None, :, None]


def _scan_by_state(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor | None,
    C: Tensor | None,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    B_constant: Tensor | None,
    C_constant: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The scan with B or C constant along the sequence but different for each channel.

    A state is linear in a constant B, and the output in a constant C, so both leave the recurrence as weights of the
    single states' scans. These are summed in the state dtype, so that the output is rounded once.
    """
    dtype = state_dtype(x.dtype)
    wide, delta = x.to(dtype), delta.to(dtype)
    B, C, D, B_constant, C_constant = (
        None if value is None else value.to(dtype) for value in (B, C, D, B_constant, C_constant)
    )
    output = torch.zeros_like(wide) if D is None else D[0] * wide
    lasts = []
    for n in range(A.shape[2]):
        B_n, C_n = (None if value is None else value[..., n : n + 1] for value in (B, C))
        y, last = scan_routes(wide, delta, A[..., n : n + 1], B_n, C_n, None, delta_bias, [ROW], False, delta_softplus)
        if B_constant is not None:
            y = y * B_constant[:, n]
            last = last * B_constant[:, n : n + 1]
        if C_constant is not None:
            y = y * C_constant[:, n]
        output = output + y
        lasts.append(last)
    return output.to(x.dtype), torch.cat(lasts, dim=-1)
