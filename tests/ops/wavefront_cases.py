"""Inputs of the wavefront scan, and the scan as a plain loop over pixels, from its equations."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.ops.route_cases import decay_rates, normal

PARAMETERS = {'A_top', 'A_left', 'D'}
MAPS = ('x', 'delta_top', 'delta_left', 'B_top', 'B_left', 'C')


def loop(
    x: Tensor,
    delta_top: Tensor,
    delta_left: Tensor,
    A_top: Tensor,
    A_left: Tensor,
    B_top: Tensor,
    B_left: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    reverse: bool = False,
) -> Tensor:
    """``cuda_ops.wavefront_scan`` pixel by pixel; gradients come from autograd."""
    batch, height, width, channels = x.shape
    rows, columns = list(range(height)), list(range(width))
    if reverse:
        rows, columns = rows[::-1], columns[::-1]
    states: dict[tuple[int, int], Tensor] = {}
    outputs: dict[tuple[int, int], Tensor] = {}
    # Inputs that the borders leave out get a gradient of zero.
    nothing = 0 * (delta_top.sum() + delta_left.sum() + A_top.sum() + A_left.sum() + B_top.sum() + B_left.sum())
    for p, i in enumerate(rows):
        for q, j in enumerate(columns):
            u, dT, dL = x[:, i, j, :, None], delta_top[:, i, j, :, None], delta_left[:, i, j, :, None]
            bT, bL = dT * B_top[:, i, j, None] * u, dL * B_left[:, i, j, None] * u
            if p == 0 and q == 0:
                h = bL + nothing
            elif p == 0:
                h = torch.exp(dL * A_left) * states[0, q - 1] + bL
            elif q == 0:
                h = torch.exp(dT * A_top) * states[p - 1, 0] + bT
            else:
                h = 0.5 * (
                    torch.exp(dL * A_left) * states[p, q - 1] + bL + torch.exp(dT * A_top) * states[p - 1, q] + bT
                )
            states[p, q] = h
            y = (C[:, i, j, None] * h).sum(-1)
            outputs[i, j] = y if D is None else y + D * x[:, i, j]
    return torch.stack([outputs[i, j] for i in range(height) for j in range(width)], dim=1).view(x.shape)


@dataclass(frozen=True)
class Wavefront:
    """A case of ``wavefront_scan``."""

    batch: int
    height: int
    width: int
    channels: int
    states: int
    reverse: bool = False
    D: bool = True

    def __str__(self) -> str:
        extras = ('-reverse' if self.reverse else '') + ('' if self.D else '-without-D')
        return f'{self.batch}x{self.height}x{self.width}x{self.channels}-N{self.states}{extras}'

    def inputs(self) -> dict[str, Tensor | None]:
        grid = (self.batch, self.height, self.width)
        # Step sizes behind a softplus are positive.
        top, left = (torch.rand(*grid, self.channels, dtype=torch.float64).mul_(0.9).add_(0.01) for _ in range(2))
        return {
            'x': normal(*grid, self.channels),
            'delta_top': top,
            'delta_left': left,
            'A_top': decay_rates(self.channels, self.states),
            'A_left': decay_rates(self.channels, self.states),
            'B_top': normal(*grid, self.states),
            'B_left': normal(*grid, self.states),
            'C': normal(*grid, self.states),
            'D': normal(self.channels) if self.D else None,
        }

    def options(self) -> dict[str, Any]:
        return {'reverse': self.reverse}


# Either side the longer one, sides of one, primes, whole and partial vectors of channels and of states.
CASES = (
    Wavefront(1, 1, 1, 1, 1),
    Wavefront(2, 1, 1, 17, 3, reverse=True),
    Wavefront(2, 1, 7, 3, 2),
    Wavefront(1, 7, 1, 16, 3, reverse=True),
    Wavefront(1, 1, 65, 2, 5, reverse=True, D=False),
    Wavefront(1, 65, 1, 5, 1),
    Wavefront(1, 2, 2, 5, 16),
    Wavefront(3, 2, 3, 15, 2, reverse=True),
    Wavefront(1, 3, 2, 63, 1),
    Wavefront(2, 5, 11, 17, 4, reverse=True),
    Wavefront(1, 11, 5, 33, 1, D=False),
    Wavefront(1, 13, 13, 48, 16),
    Wavefront(1, 7, 9, 64, 17, reverse=True),
    Wavefront(3, 4, 6, 32, 8),
    Wavefront(1, 3, 37, 8, 33),
    Wavefront(1, 40, 3, 20, 2, reverse=True),
    Wavefront(9, 3, 3, 40, 3),
    Wavefront(0, 3, 4, 8, 2),
)
