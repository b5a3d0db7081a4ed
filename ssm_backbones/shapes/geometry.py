"""Signed distances to the shapes, in pixels: negative inside, zero on the edge.

Only operations that IEEE 754 rounds exactly (+ - * / sqrt) touch the arrays, so every machine draws the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ssm_backbones.shapes.classes import CLASSES
from ssm_backbones.shapes.rng import ImageRng, unit_vector

Distance = Callable[[np.ndarray, np.ndarray], np.ndarray]
Point = tuple[float, float]


@dataclass(frozen=True)
class Shape:
    """A shape in the plane.

    Attributes:
        label: Index into `CLASSES`.
        x, y: Centre in pixels; pixel (row, column) has its centre at (column + 0.5, row + 0.5).
        radius: Radius in pixels of the circle around the shape.
        distance: Maps coordinates x, y (arrays that broadcast) to the signed distance.
    """

    label: int
    x: float
    y: float
    radius: float
    distance: Distance


def make_shape(rng: ImageRng, label: int, x: float, y: float, radius: float) -> Shape:
    """Build a shape of class `label` about (x, y), of random rotation and proportions."""
    name = CLASSES[label]
    if name == 'disc':
        distance = _circle(x, y, radius)
    elif name == 'ring':
        distance = _ring(x, y, radius, radius * rng.uniform(0.48, 0.62))
    else:
        corners = _CORNERS[name](rng)
        cos, sin = rng.direction()
        distance = polygon_distance(
            [(x + radius * (cos * u - sin * v), y + radius * (sin * u + cos * v)) for u, v in corners]
        )
    return Shape(label, x, y, radius, distance)


def segment_distance(start: Point, end: Point, thickness: float) -> Distance:
    """Signed distance to a line segment of the given thickness with round ends."""

    def distance(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.sqrt(_squared_distance(x, y, start, end)) - 0.5 * thickness

    return distance


def polygon_distance(corners: Sequence[Point]) -> Distance:
    """Signed distance to a polygon without self-intersections."""

    def distance(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        nearest = np.full(np.broadcast_shapes(x.shape, y.shape), np.inf)
        inside = np.zeros(nearest.shape, dtype=bool)
        for start, end in zip(corners, [*corners[1:], corners[0]], strict=True):
            np.minimum(nearest, _squared_distance(x, y, start, end), out=nearest)
            if start[1] != end[1]:
                crossing = start[0] + (y - start[1]) * ((end[0] - start[0]) / (end[1] - start[1]))
                inside ^= ((start[1] > y) != (end[1] > y)) & (x < crossing)
        nearest = np.sqrt(nearest)
        return np.where(inside, -nearest, nearest)

    return distance


def _squared_distance(x: np.ndarray, y: np.ndarray, start: Point, end: Point) -> np.ndarray:
    along_x, along_y = end[0] - start[0], end[1] - start[1]
    squared_length = max(along_x * along_x + along_y * along_y, 1e-12)
    from_x, from_y = x - start[0], y - start[1]
    position = np.clip(from_x * (along_x / squared_length) + from_y * (along_y / squared_length), 0.0, 1.0)
    off_x, off_y = from_x - position * along_x, from_y - position * along_y
    return off_x * off_x + off_y * off_y


def _circle(cx: float, cy: float, radius: float) -> Distance:
    def distance(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.sqrt((x - cx) * (x - cx) + (y - cy) * (y - cy)) - radius

    return distance


def _ring(cx: float, cy: float, outer: float, inner: float) -> Distance:
    middle, half = 0.5 * (outer + inner), 0.5 * (outer - inner)

    def distance(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.abs(np.sqrt((x - cx) * (x - cx) + (y - cy) * (y - cy)) - middle) - half

    return distance


def _rectangle(rng: ImageRng) -> list[Point]:
    cos, sin = unit_vector(rng.uniform(26.0, 45.0))
    return [(cos, sin), (-cos, sin), (-cos, -sin), (cos, -sin)]


def _triangle(rng: ImageRng) -> list[Point]:
    return [unit_vector(120.0 * corner + rng.uniform(-12.0, 12.0)) for corner in range(3)]


def _star(rng: ImageRng) -> list[Point]:
    inner = rng.uniform(0.40, 0.48)
    corners = []
    for tip in range(5):
        corners.append(unit_vector(72.0 * tip))
        cos, sin = unit_vector(72.0 * tip + 36.0)
        corners.append((inner * cos, inner * sin))
    return corners


def _cross(rng: ImageRng) -> list[Point]:
    # The twelve corners are the four ends of each arm and the four notches between the arms.
    cos, sin = unit_vector(rng.uniform(15.0, 20.0))
    corners = []
    for ax, ay in ((1, 0), (0, 1), (-1, 0), (0, -1)):
        corners.append((cos * ax + sin * ay, cos * ay - sin * ax))
        corners.append((cos * ax - sin * ay, cos * ay + sin * ax))
        corners.append((sin * (ax - ay), sin * (ay + ax)))
    return corners


_CORNERS: dict[str, Callable[[ImageRng], list[Point]]] = {
    'rectangle': _rectangle,
    'triangle': _triangle,
    'star': _star,
    'cross': _cross,
}
