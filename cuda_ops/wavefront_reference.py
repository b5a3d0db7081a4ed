"""The oracle of the wavefront scan: its recurrence and gradients in plain PyTorch, one anti-diagonal after the other.

Pixels on an anti-diagonal do not depend on each other, so a map takes ``H + W - 1`` steps. The backward pass
materialises the states of every pixel, (batch, height, width, channels, states): this is the fallback and the
yardstick, not the way to train.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from cuda_ops.route_reference import state_dtype


class _Diagonal:
    """The pixels (i, s - i) of one anti-diagonal, by their rows ``first`` to ``end``, and the weight of each neighbour.

    Inside the map both neighbours count half; on its upper and left border the one that exists counts whole. The first
    pixel has none, and takes the left one's inflow.
    """

    def __init__(self, s: int, height: int, width: int, like: Tensor) -> None:
        self.first, self.end = max(0, s - width + 1), min(s, height - 1) + 1
        self.rows = torch.arange(self.first, self.end, device=like.device)
        self.columns = s - self.rows
        both = ((self.rows > 0) & (self.columns > 0)).to(like.dtype) * 0.5
        only_top = ((self.rows > 0) & (self.columns == 0)).to(like.dtype)
        self.top = (both + only_top)[:, None]
        self.left = 1 - self.top

    def of(self, grid: Tensor) -> Tensor:
        """The diagonal's pixels of a (B, H, W, ...) map: (B, K, ...)."""
        return grid[:, self.rows, self.columns]

    def onto(self, grid: Tensor, values: Tensor) -> None:
        """Write the diagonal's pixels of a map."""
        grid[:, self.rows, self.columns] = values


def _diagonals(x: Tensor) -> Iterator[_Diagonal]:
    height, width = x.shape[1:3]
    return (_Diagonal(s, height, width, x) for s in range(height + width - 1))


class _Neighbours:
    """The states beside those of one diagonal, from the last state seen in each row, led by a row of zeros."""

    def __init__(self, last: Tensor, diagonal: _Diagonal) -> None:
        self.top = last[:, diagonal.first : diagonal.end]
        self.left = last[:, diagonal.first + 1 : diagonal.end + 1]


def _decays(d: _Diagonal, delta: Tensor, A: Tensor, weight: Tensor) -> Tensor:
    return weight[..., None] * torch.exp(d.of(delta)[..., None] * A)


def _oriented(reverse: bool, *maps: Tensor) -> list[Tensor]:
    """The maps in the state dtype, turned so that the scan starts in the upper left corner."""
    dtype = state_dtype(maps[0].dtype)
    return [(value.flip(1, 2) if reverse else value).to(dtype) for value in maps]


def _without_neighbour(top: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
    """Zeros where a pixel has no such neighbour: what is given there, be it not a number, has no part in the scan."""
    first_row = torch.arange(top.shape[1], device=top.device)[:, None, None] == 0
    # The first pixel takes the left neighbour's share.
    first_column = (torch.arange(left.shape[2], device=left.device)[:, None] == 0) & ~first_row
    return top.masked_fill(first_row, 0), left.masked_fill(first_column, 0)


def _states(
    d: _Diagonal,
    last: Tensor,
    x: Tensor,
    delta_top: Tensor,
    delta_left: Tensor,
    A_top: Tensor,
    A_left: Tensor,
    B_top: Tensor,
    B_left: Tensor,
) -> Tensor:
    """The states (B, K, E, N) of one diagonal's pixels."""
    neighbours = _Neighbours(last, d)
    u = d.of(x)
    inflow_top = (d.top * d.of(delta_top) * u)[..., None] * d.of(B_top)[:, :, None]
    inflow_left = (d.left * d.of(delta_left) * u)[..., None] * d.of(B_left)[:, :, None]
    return (
        _decays(d, delta_top, A_top, d.top) * neighbours.top
        + inflow_top
        + _decays(d, delta_left, A_left, d.left) * neighbours.left
        + inflow_left
    )


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
) -> Tensor:
    """The two-neighbour recurrence over (B, H, W, E); see :func:`cuda_ops.wavefront_scan` for arguments and result."""
    maps = _oriented(reverse, x, delta_top, delta_left, B_top, B_left, C)
    u, d_top, d_left, b_top, b_left, c = maps
    (d_top, d_left), (b_top, b_left) = _without_neighbour(d_top, d_left), _without_neighbour(b_top, b_left)
    last = u.new_zeros((u.shape[0], u.shape[1] + 1, *A_top.shape))
    outputs, pixels = [], []
    for d in _diagonals(u):
        h = _states(d, last, u, d_top, d_left, A_top, A_left, b_top, b_left)
        outputs.append((h * d.of(c)[:, :, None]).sum(-1))
        pixels.append(d.rows * u.shape[2] + d.columns)
        last = torch.cat([last[:, : d.first + 1], h, last[:, d.end + 1 :]], dim=1)
    output = torch.cat(outputs, dim=1)[:, torch.cat(pixels).argsort()].view(u.shape)
    if D is not None:
        output = output + D * u
    return (output.flip(1, 2) if reverse else output).to(x.dtype)


def wavefront_scan_backward(
    grad_output: Tensor,
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
) -> dict[str, Tensor]:
    """Gradients of :func:`wavefront_scan`, by name, for every tensor that was given.

    With ``g`` the gradient of a pixel's states, ``a`` the decays and 1/2 the weight of each neighbour,
    ``g(i,j) = C(i,j) * dy(i,j) + 1/2 * aL(i,j+1) * g(i,j+1) + 1/2 * aT(i+1,j) * g(i+1,j)``: the recurrence from the
    opposite corner. Each pixel passes the carry ``weight * a * g`` back to its neighbours.
    """
    maps = _oriented(reverse, x, delta_top, delta_left, B_top, B_left, C, grad_output)
    u, d_top, d_left, b_top, b_left, c, dy = maps
    (d_top, d_left), (b_top, b_left) = _without_neighbour(d_top, d_left), _without_neighbour(b_top, b_left)
    grads = {
        name: torch.zeros_like(value)
        for name, value in (
            ('x', u),
            ('delta_top', d_top),
            ('delta_left', d_left),
            ('A_top', A_top),
            ('A_left', A_left),
            ('B_top', b_top),
            ('B_left', b_left),
            ('C', c),
        )
    }
    batch, height = u.shape[:2]
    # One diagonal's states need those of the diagonal before, each led by a row of zeros.
    history = [u.new_zeros((batch, height + 1, *A_top.shape))]
    for d in _diagonals(u):
        last = history[-1].clone()
        last[:, d.first + 1 : d.end + 1] = _states(d, history[-1], u, d_top, d_left, A_top, A_left, b_top, b_left)
        history.append(last)
    carry = u.new_zeros((batch, height + 1, *A_top.shape))
    for s, d in reversed(list(enumerate(_diagonals(u)))):
        neighbours, h = _Neighbours(history[s], d), _Neighbours(history[s + 1], d).left
        value, grad_y = d.of(u), d.of(dy)
        g = carry[:, d.first + 1 : d.end + 1] + grad_y[..., None] * d.of(c)[:, :, None]
        d.onto(grads['C'], (grad_y[..., None] * h).sum(2))
        grad_value = torch.zeros_like(value)
        carries = {}
        for name, delta, A, B, weight, states in (
            ('top', d_top, A_top, b_top, d.top, neighbours.top),
            ('left', d_left, A_left, b_left, d.left, neighbours.left),
        ):
            carries[name] = _decays(d, delta, A, weight) * g
            through_decay = carries[name] * states
            through_input = weight * (g * d.of(B)[:, :, None]).sum(-1)
            d.onto(grads[f'delta_{name}'], (through_decay * A).sum(-1) + through_input * value)
            d.onto(grads[f'B_{name}'], (g * (weight * d.of(delta) * value)[..., None]).sum(2))
            grads[f'A_{name}'] += (through_decay * d.of(delta)[..., None]).sum((0, 1))
            grad_value += through_input * d.of(delta)
        d.onto(grads['x'], grad_value)
        carry = torch.zeros_like(carry)
        carry[:, d.first + 1 : d.end + 1] = carries['left']
        carry[:, d.first : d.end] += carries['top']
    if D is not None:
        grads['x'] += D * dy
        grads['D'] = (dy * u).sum((0, 1, 2))
    return {name: value.flip(1, 2) if reverse and value.dim() == 4 else value for name, value in grads.items()}
