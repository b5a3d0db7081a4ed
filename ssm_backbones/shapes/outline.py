"""Exact outlines of binary masks, and COCO's segmentations made from them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Outline:
    """A closed line along pixel edges.

    Attributes:
        points: Corners (x, y) in order; consecutive ones differ in one coordinate.
        hole: Whether it surrounds background.
        area: Pixels enclosed, holes not taken off.
    """

    points: list[tuple[int, int]]
    hole: bool
    area: int


def trace(mask: np.ndarray) -> list[Outline]:
    """Trace the outlines of the mask's parts and of their holes, from top to bottom.

    Parts are 8-connected: pixels that touch in a corner belong to one part, whose outline then passes there twice.

    Args:
        mask: Boolean (height, width).
    """
    padded = np.pad(mask, 1)
    upper_left, upper_right = padded[:-1, :-1], padded[:-1, 1:]
    lower_left, lower_right = padded[1:, :-1], padded[1:, 1:]
    # A grid point is a corner where an odd number of its four pixels is set. Where two pixels meet diagonally there
    # are two corners, one on each clear pixel; `after` orders them along the row, `below` along the column.
    y1, x1 = np.nonzero(upper_left ^ upper_right ^ lower_left ^ lower_right)
    y2, x2 = np.nonzero(upper_right & lower_left & ~upper_left & ~lower_right)
    y3, x3 = np.nonzero(upper_left & lower_right & ~upper_right & ~lower_left)
    y = np.concatenate([y1, y2, y2, y3, y3])
    x = np.concatenate([x1, x2, x2, x3, x3])
    zeros, ones = np.zeros_like, np.ones_like
    after = np.concatenate([zeros(y1), zeros(y2), ones(y2), zeros(y3), ones(y3)])
    below = np.concatenate([zeros(y1), zeros(y2), ones(y2), ones(y3), zeros(y3)])
    # Along any grid line, edges run from the first corner to the second, from the third to the fourth, and so on.
    by_row = np.lexsort((after, x, y))
    across = _partners(by_row)
    down = _partners(np.lexsort((below, y, x)))
    point_x, point_y = x.tolist(), y.tolist()
    outlines = []
    seen = [False] * len(point_x)
    for start in by_row.tolist():
        if seen[start]:
            continue
        points, doubled, here = [], 0, start
        while not seen[here]:
            there = across[here]
            seen[here] = seen[there] = True
            points += [(point_x[here], point_y[here]), (point_x[there], point_y[there])]
            doubled += 2 * point_y[here] * (point_x[here] - point_x[there])
            here = down[there]
        # The start is the outline's upper left corner, so the pixel at its lower right lies inside.
        outlines.append(Outline(points, not lower_right[points[0][1], points[0][0]], abs(doubled) // 2))
    return outlines


def polygons(outlines: list[Outline]) -> list[list[int]]:
    """Return COCO polygons [x0, y0, x1, y1, ...], one per part.

    pycocotools rasterises them to exactly the mask that was traced.

    Raises:
        ValueError: If an outline is a hole, which COCO's polygons cannot express.
    """
    if any(outline.hole for outline in outlines):
        raise ValueError('the mask has a hole: polygons cannot express it, use a run-length encoding')
    return [[coordinate for point in outline.points for coordinate in point] for outline in outlines]


def run_lengths(mask: np.ndarray) -> list[int]:
    """Return COCO's uncompressed run lengths of a bool (height, width) mask: column by column, zeros first."""
    flat = mask.ravel(order='F')
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    counts = np.diff(np.concatenate([[0], changes, [flat.size]])).tolist()
    return [0, *counts] if flat[0] else counts


def compress_counts(counts: list[int]) -> str:
    """Encode run lengths in COCO's text form.

    From the fourth on, a run is stored as its difference to the one two before; each number is written in groups of
    five bits, lowest first, with a bit for "more follows", offset into printable ASCII.
    """
    text = []
    for position, count in enumerate(counts):
        value = count - counts[position - 2] if position > 2 else count
        while True:
            group, value = value & 31, value >> 5
            # Arithmetic shifting ends in 0 or -1; the last group's top bit has to carry that sign.
            done = value == (-1 if group & 16 else 0)
            text.append(chr(48 + (group if done else group | 32)))
            if done:
                break
    return ''.join(text)


def _partners(order: np.ndarray) -> list[int]:
    partner = np.empty_like(order)
    partner[order[0::2]] = order[1::2]
    partner[order[1::2]] = order[0::2]
    return partner.tolist()
