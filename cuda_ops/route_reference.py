"""The oracle: the scans' recurrences in plain PyTorch, in any floating dtype and on any device.

A first-order recurrence ``h_l = a_l * h_{l-1} + b_l`` is an associative scan, so it is computed here in a logarithmic
number of tensor operations (Hillis and Steele, 1986) rather than by a loop over positions. The states of every position
are materialised, (batch, length, channels, states) for each route: this is the fallback and the yardstick, not the way
to train. The gradients are written out too, since a recurrence's adjoint is the same recurrence run backwards.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

# Routes over the grid, in SS2D's order. The code's lowest bit chooses the axis, the next one the direction.
ROW, COLUMN, ROW_REVERSED, COLUMN_REVERSED = range(4)


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of all state arithmetic: float64 for float64 input, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def low_rank_delta(dt: Tensor, weight: Tensor) -> Tensor:
    """Project the low-rank dt to delta, ``delta[..., k, :] = weight[k] @ dt[..., k, :]``, in dt's dtype.

    Args:
        dt: (B, H, W, K, R), of dt_rank R.
        weight: (K, E, R), in any floating dtype.

    Returns:
        (B, H, W, K, E), routes lying apart in memory, as one product for each of them leaves them.
    """
    batch, height, width, routes, rank = dt.shape
    # By reshape: flatten has no rule for the vmap of torch.autograd.grad(is_grads_batched=True).
    factors = dt.reshape(-1, routes, rank).transpose(0, 1)
    # As an operator: counters that replace torch.bmm count the scans' projections by the scans' own formulas.
    products = torch.ops.aten.bmm(factors, weight.to(dt.dtype).transpose(1, 2))
    return products.view(routes, batch, height, width, weight.shape[1]).permute(1, 2, 3, 0, 4)


def linear_recurrence(decay: Tensor, inflow: Tensor) -> Tensor:
    """``h_l = decay_l * h_{l-1} + inflow_l`` along dim 1, from ``h_0 = 0``, in log2(length) steps.

    Args:
        decay: (batch, length, ...) factors.
        inflow: the same shape, added at each position.

    Returns:
        The states of every position, in the shape and dtype of ``inflow``.
    """
    length, step = inflow.shape[1], 1
    if length == 1:
        # No decay takes part, and yet its gradient shall be zero, rather than missing.
        return torch.where(torch.zeros((), dtype=torch.bool, device=decay.device), decay, inflow)
    while step < length:
        # Each pair (decay, inflow) absorbs the one `step` positions before it.
        inflow = torch.cat([inflow[:, :step], inflow[:, step:] + decay[:, step:] * inflow[:, :-step]], dim=1)
        decay = torch.cat([decay[:, :step], decay[:, step:] * decay[:, :-step]], dim=1)
        step *= 2
    return inflow


def along_route(grid: Tensor, route: int, per_line: bool) -> Tensor:
    """Reorder a (B, H, W, ...) grid into (lines, positions, ...) as ``route`` visits them.

    Without ``per_line`` a line is a whole image; with it a line is one row or column.
    """
    if route in (COLUMN, COLUMN_REVERSED):
        grid = grid.transpose(1, 2)
    sequence = grid.flatten(0, 1) if per_line else grid.flatten(1, 2)
    return sequence.flip(1) if route in (ROW_REVERSED, COLUMN_REVERSED) else sequence


def onto_grid(sequence: Tensor, route: int, height: int, width: int) -> Tensor:
    """Undo :func:`along_route`: (lines, positions, ...) back to (B, H, W, ...)."""
    if route in (ROW_REVERSED, COLUMN_REVERSED):
        sequence = sequence.flip(1)
    if route in (COLUMN, COLUMN_REVERSED):
        return sequence.reshape(-1, width, height, *sequence.shape[2:]).transpose(1, 2)
    return sequence.reshape(-1, height, width, *sequence.shape[2:])


class _Route:
    """One route's inputs in visiting order, (lines, positions, ...), and its states."""

    def __init__(
        self,
        k: int,
        x: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor | None,
        C: Tensor | None,
        delta_bias: Tensor | None,
        route: int,
        per_line: bool,
        delta_softplus: bool,
    ) -> None:
        dtype = state_dtype(x.dtype)
        projection = C if B is None else B
        self.grouped = projection is not None and projection.dim() == 6
        groups = projection.shape[4] if projection is not None and self.grouped else 1
        self.channels_per_group = x.shape[3] // groups
        self.u = along_route(x, route, per_line).to(dtype)
        self.raw = along_route(delta[:, :, :, k], route, per_line).to(dtype)
        if delta_bias is not None:
            self.raw = self.raw + delta_bias[k]
        self.d = F.softplus(self.raw) if delta_softplus else self.raw
        self.A = A[k]
        self.B = self._per_channel(B, k, route, per_line, dtype)
        self.C = self._per_channel(C, k, route, per_line, dtype)
        self.decay = torch.exp(self.d.unsqueeze(-1) * self.A)
        self.states = linear_recurrence(self.decay, (self.d * self.u).unsqueeze(-1) * self.B)

    def _per_channel(self, projection: Tensor | None, k: int, route: int, per_line: bool, dtype: torch.dtype) -> Tensor:
        if projection is None:
            return self.decay_shape_ones(dtype)
        sequence = along_route(projection[:, :, :, k], route, per_line).to(dtype)
        if not self.grouped:
            return sequence.unsqueeze(2)
        return sequence.repeat_interleave(self.channels_per_group, dim=2)

    def decay_shape_ones(self, dtype: torch.dtype) -> Tensor:
        return self.A.new_ones((1, 1, 1, self.A.shape[1]), dtype=dtype)

    def per_group(self, gradient: Tensor) -> Tensor:
        """Sum a gradient over the channels that share one row of B or C."""
        if not self.grouped:
            return gradient.sum(2)
        return gradient.unflatten(2, (-1, self.channels_per_group)).sum(3)


def _numbered(routes: list[int], A: Tensor, per_line: bool) -> list[tuple[int, int]]:
    """Each route with the place of its inputs; lines scanned both ways have one set of inputs.

    Raises:
        ValueError: there are fewer inputs, or more, than the routes take.
    """
    if A.shape[0] == len(routes):
        return list(enumerate(routes))
    if not (per_line and A.shape[0] == 1 and len(routes) == 2 and routes[1] == routes[0] ^ ROW_REVERSED):
        raise ValueError(f'the inputs of {A.shape[0]} routes do not serve the routes {routes} with per_line={per_line}')
    return [(0, route) for route in routes]


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
) -> tuple[Tensor, Tensor]:
    """The selective scan along each route, summed over the routes in image order.

    Args:
        x: (B, H, W, E), float.
        delta: (B, H, W, K, E), before bias and softplus.
        A: (K, E, N), B and C: (B, H, W, K, N), (B, H, W, K, G, N) with G dividing E, or None for ones; D and
            delta_bias: (K, E) or None.
        routes: K route codes, :data:`ROW` to :data:`COLUMN_REVERSED`; with ``per_line`` two may share what is given
            for one.
        per_line: start from a zero state at every row (or column) instead of once an image.
        delta_softplus: whether delta + delta_bias passes a softplus.

    Returns:
        The output (B, H, W, E) in x's dtype, and the state after the last position of each route (B, K, E, N) in the
        state dtype, empty with ``per_line``.
    """
    height, width = x.shape[1:3]
    dtype = state_dtype(x.dtype)
    # Converted once, so that the routes' gradients are added up in the state dtype.
    wide, delta = x.to(dtype), delta.to(dtype)
    B, C = (None if value is None else value.to(dtype) for value in (B, C))
    outputs, lasts = [], []
    for k, route in _numbered(routes, A, per_line):
        r = _Route(k, wide, delta, A, B, C, delta_bias, route, per_line, delta_softplus)
        y = (r.states * r.C).sum(-1)
        if D is not None:
            y = y + D[k] * r.u
        outputs.append(onto_grid(y, route, height, width))
        lasts.append(r.states[:, -1])
    last = x.new_zeros((0, *A.shape), dtype=dtype) if per_line else torch.stack(lasts, dim=1)
    return sum(outputs[1:], outputs[0]).to(x.dtype), last


def route_scan_backward(
    grad_output: Tensor,
    grad_last: Tensor | None,
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
) -> dict[str, Tensor]:
    """Gradients of :func:`route_scan`, by name, for every tensor that was given.

    With ``g_l`` the gradient of the state, ``g_l = C_l * dy_l + decay_{l+1} * g_{l+1}``: the forward recurrence on the
    reversed sequence, with the decays shifted by one position.
    """
    height, width = x.shape[1:3]
    dtype = state_dtype(x.dtype)
    grads = {
        name: torch.zeros_like(value, dtype=dtype, memory_format=torch.contiguous_format)
        for name, value in (
            ('x', x),
            ('delta', delta),
            ('A', A),
            ('B', B),
            ('C', C),
            ('D', D),
            ('delta_bias', delta_bias),
        )
        if value is not None
    }
    for k, route in _numbered(routes, A, per_line):
        r = _Route(k, x, delta, A, B, C, delta_bias, route, per_line, delta_softplus)
        dy = along_route(grad_output, route, per_line).to(dtype)
        source = dy.unsqueeze(-1) * r.C
        source = source.expand(r.states.shape).clone()
        if grad_last is not None and not per_line:
            source[:, -1] += grad_last[:, k].to(dtype)
        shifted = torch.cat([r.decay[:, 1:], torch.zeros_like(r.decay[:, :1])], dim=1)
        g = linear_recurrence(shifted.flip(1), source.flip(1)).flip(1)
        before = torch.cat([torch.zeros_like(r.states[:, :1]), r.states[:, :-1]], dim=1)
        through_decay = g * r.decay * before
        through_input = (g * r.B).sum(-1)
        d_delta = (through_decay * r.A).sum(-1) + through_input * r.u
        if delta_softplus:
            # Above 20 softplus returns its argument.
            d_delta = torch.where(r.raw > 20, d_delta, d_delta * torch.sigmoid(r.raw))
        du = through_input * r.d
        if D is not None:
            du = du + D[k] * dy
            grads['D'][k] += (dy * r.u).sum((0, 1))
        grads['x'] += onto_grid(du, route, height, width)
        grads['delta'][:, :, :, k] += onto_grid(d_delta, route, height, width)
        grads['A'][k] += (through_decay * r.d.unsqueeze(-1)).sum((0, 1))
        if delta_bias is not None:
            grads['delta_bias'][k] += d_delta.sum((0, 1))
        if B is not None:
            per_group = r.per_group(g * (r.d * r.u).unsqueeze(-1))
            grads['B'][:, :, :, k] += onto_grid(per_group, route, height, width)
        if C is not None:
            grads['C'][:, :, :, k] += onto_grid(r.per_group(dy.unsqueeze(-1) * r.states), route, height, width)
    return grads
