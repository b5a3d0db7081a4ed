"""Colours and textures."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np

from ssm_backbones.shapes.rng import ImageRng

Colour = tuple[float, float, float]
TEXTURES: tuple[str, ...] = ('flat', 'stripes', 'checker', 'noise', 'gradient')


def pick_colour(rng: ImageRng, unlike: Sequence[Colour], gap: float) -> Colour:
    """Draw a vivid RGB colour (0..1) at least `gap` from each of `unlike`, or the farthest of 12 draws."""
    best: Colour = (0.0, 0.0, 0.0)
    best_gap = -1.0
    for _ in range(12):
        colour = colorsys.hsv_to_rgb(rng.uniform(), rng.uniform(0.3, 1.0), rng.uniform(0.25, 1.0))
        nearest = min((_gap(colour, other) for other in unlike), default=gap)
        if nearest >= gap:
            return colour
        if nearest > best_gap:
            best, best_gap = colour, nearest
    return best


def muted_colour(rng: ImageRng) -> Colour:
    """Draw a weakly saturated RGB colour (0..1), for backgrounds."""
    return colorsys.hsv_to_rgb(rng.uniform(), rng.uniform(0.0, 0.45), rng.uniform(0.15, 0.9))


def shift_colour(rng: ImageRng, colour: Colour, amount: float) -> Colour:
    """Make the colour lighter or darker by `amount`, whichever has room, and vary its channels a little."""
    step = amount if sum(colour) < 1.5 else -amount
    red, green, blue = (min(1.0, max(0.0, channel + step * rng.uniform(0.7, 1.3))) for channel in colour)
    return red, green, blue


def texture(
    rng: ImageRng, kind: str, height: int, width: int, colours: tuple[Colour, Colour], period: float
) -> np.ndarray:
    """Draw a field of two colours.

    Args:
        kind: One of `TEXTURES`.
        height, width: Size in pixels.
        colours: The two RGB colours (0..1); `flat` takes the first alone.
        period: Width of a pair of stripes, or size of a cell of noise, in pixels; at least 4.

    Returns:
        float64 (height, width, 3) in [0, 1].
    """
    first, second = (np.array(colour) for colour in colours)
    if kind == 'flat':
        return np.broadcast_to(first, (height, width, 3))
    x, y = np.arange(width)[None, :] + 0.5, np.arange(height)[:, None] + 0.5
    if kind == 'noise':
        weight = value_noise(rng, height, width, period)
    else:
        cos, sin = rng.direction()
        along, across = x * cos + y * sin, y * cos - x * sin
        if kind == 'stripes':
            weight = 0.5 + 0.5 * _wave(along, period)
        elif kind == 'checker':
            weight = 0.5 + 0.5 * _wave(along, period) * _wave(across, period)
        elif kind == 'gradient':
            centred = along - 0.5 * (width * cos + height * sin)
            weight = np.clip(0.5 + centred / max(height, width), 0.0, 1.0)
        else:
            raise ValueError(f'unknown texture {kind!r}; known are {", ".join(TEXTURES)}')
    return first + weight[:, :, None] * (second - first)


def value_noise(rng: ImageRng, height: int, width: int, cell: float) -> np.ndarray:
    """Smooth noise, float64 (height, width) in [0, 1]: a random grid of the given cell size, interpolated linearly."""
    rows, row_weight = _grid_positions(height, cell)
    columns, column_weight = _grid_positions(width, cell)
    grid = rng.array(int(rows[-1]) + 2, int(columns[-1]) + 2)
    above, below = grid[rows], grid[rows + 1]
    lines = above + row_weight[:, None] * (below - above)
    left, right = lines[:, columns], lines[:, columns + 1]
    return left + column_weight[None, :] * (right - left)


def _grid_positions(length: int, cell: float) -> tuple[np.ndarray, np.ndarray]:
    position = (np.arange(length) + 0.5) / cell
    index = np.floor(position).astype(np.int64)
    return index, position - index


def _wave(position: np.ndarray, period: float) -> np.ndarray:
    # A square wave between -1 and 1 whose flanks are one pixel wide.
    phase = position / period
    triangle = np.abs(2.0 * (phase - np.floor(phase)) - 1.0) - 0.5
    return np.clip(triangle * period, -1.0, 1.0)


def _gap(one: Colour, other: Colour) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))
