"""The scans as plain loops over positions, from their equations, in any floating dtype. Nothing here is the library's.

The loops are vectorised over images and channels alone. Gradients come from autograd.
"""

import torch
from torch import Tensor


def softplus(v: Tensor) -> Tensor:
    """log(1 + exp(v)), and v itself above 20."""
    return torch.where(v > 20, v, torch.log1p(torch.exp(torch.clamp(v, max=20))))


def scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor]:
    """One recurrence along dim -2 of u and delta (..., L, E); A (E, N); B, C (..., L, E or 1, N); D, delta_bias (E).

    Returns:
        y (..., L, E) and the last state (..., E, N).
    """
    d = delta if delta_bias is None else delta + delta_bias
    if delta_softplus:
        d = softplus(d)
    decays = torch.exp(d.unsqueeze(-1) * A)
    inflows = (d * u).unsqueeze(-1) * B
    h = torch.zeros_like(inflows[..., 0, :, :])
    states = []
    for decay, inflow in zip(decays.unbind(-3), inflows.unbind(-3), strict=True):
        h = decay * h + inflow
        states.append(h)
    y = (C * torch.stack(states, dim=-3)).sum(-1)
    return (y if D is None else y + D * u), h


def selective_scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False):
    """``cuda_ops.selective_scan``: u, delta, z (B, E, L)."""
    channels = u.shape[1]

    def for_each_channel(projection: Tensor) -> Tensor:
        if projection.dim() == 2:
            return projection
        if projection.dim() == 3:
            projection = projection.unsqueeze(1)
        group = [e * projection.shape[1] // channels for e in range(channels)]
        return projection[:, group].permute(0, 3, 1, 2)

    y, last = scan(u.mT, delta.mT, A, for_each_channel(B), for_each_channel(C), D, delta_bias, delta_softplus)
    y = y.mT
    if z is not None:
        y = y * z / (1 + torch.exp(-z))
    return (y, last) if return_last_state else y


def lines_of(height: int, width: int, axis: str, reverse: bool) -> Tensor:
    """Flat pixel indices (lines, positions) of every row, or column, from its end if reversed."""
    rows = [[i * width + j for j in range(width)] for i in range(height)]
    columns = [[i * width + j for i in range(height)] for j in range(width)]
    lines = rows if axis == 'row' else columns
    return torch.tensor([line[::-1] if reverse else line for line in lines])


def scan_along(visits: Tensor, x, delta, A, B, C, D, delta_bias, delta_softplus) -> Tensor:
    """A scan of the map (B, H, W, E) along each line of flat pixel indices; every pixel belongs to one line."""
    states = A.shape[1]

    def gather(grid: Tensor) -> Tensor:
        return grid.flatten(1, 2)[:, visits]

    ones = x.new_ones(1, 1, 1, 1, states)
    y, _ = scan(
        gather(x),
        gather(delta),
        A,
        ones if B is None else gather(B).unsqueeze(-2),
        ones if C is None else gather(C).unsqueeze(-2),
        D,
        delta_bias,
        delta_softplus,
    )
    where = visits.flatten().argsort()
    return y.flatten(1, 2)[:, where].view(x.shape)


def line_scan(
    x,
    delta,
    A,
    B,
    C,
    D=None,
    delta_bias=None,
    delta_softplus=True,
    delta_weight=None,
    *,
    axis,
    reverse=False,
    both_ways=False,
):
    """``cuda_ops.line_scan``: x, delta (B, H, W, E), or delta (B, H, W, R) with delta_weight (E, R)."""
    if delta_weight is not None:
        delta = torch.einsum('bhwr,er->bhwe', delta, delta_weight)
    directions = (False, True) if both_ways else (reverse,)
    lines = (lines_of(*x.shape[1:3], axis, direction) for direction in directions)
    return sum(scan_along(each, x, delta, A, B, C, D, delta_bias, delta_softplus) for each in lines)


def cross_selective_scan(x, delta, A, B, C, D=None, delta_bias=None, delta_softplus=True, delta_weight=None):
    """``cuda_ops.cross_selective_scan``: delta (B, H, W, 4, E), or (B, H, W, 4, R) with delta_weight (4, E, R)."""
    if delta_weight is not None:
        delta = torch.einsum('bhwkr,ker->bhwke', delta, delta_weight)
    height, width = x.shape[1:3]
    y = torch.zeros_like(x)
    for k, (axis, reverse) in enumerate((('row', False), ('column', False), ('row', True), ('column', True))):
        route = lines_of(height, width, axis, False).flatten()
        route = (route.flip(0) if reverse else route).unsqueeze(0)
        y = y + scan_along(
            route,
            x,
            delta[..., k, :],
            A[k],
            B[..., k, :],
            C[..., k, :],
            None if D is None else D[k],
            None if delta_bias is None else delta_bias[k],
            delta_softplus,
        )
    return y
