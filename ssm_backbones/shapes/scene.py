"""Draw one image: shapes over a background, with annotations of each visible part."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ssm_backbones.shapes.classes import CLASSES
from ssm_backbones.shapes.geometry import Distance, Shape, make_shape, segment_distance
from ssm_backbones.shapes.outline import trace
from ssm_backbones.shapes.rng import ImageRng
from ssm_backbones.shapes.texture import TEXTURES, Colour, muted_colour, pick_colour, shift_colour, texture, value_noise

SPLITS: tuple[str, ...] = ('train', 'val')

# Smallest visible share of a shape, area of a visible part, and side of the box around what is visible (pixels).
_MIN_SHARE, _MIN_PART, _MIN_SIDE = 0.55, 16, 9
# Diameters of the circle around a shape, as shares of the image's shorter side.
_DIAMETERS = (0.15, 0.58)
_MEMBER_DIAMETERS = (0.05, 0.065)
_OBJECTS = (2, 7)
_CROWD_CHANCE = 0.06


@dataclass(frozen=True)
class Instance:
    """What is visible of one object, or of a crowd of tiny ones.

    Attributes:
        label: Index into `CLASSES`.
        mask: Boolean (height, width).
        crowd: Whether it is a group of indistinguishable objects.
    """

    label: int
    mask: np.ndarray
    crowd: bool = False


@dataclass(frozen=True)
class Scene:
    """An image and its truth.

    Attributes:
        image: uint8 (height, width, 3), RGB.
        instances: Visible objects, which share no pixel.
        clutter: Boolean (height, width): lines, dots and blobs that belong to no class and no instance.
    """

    image: np.ndarray
    instances: list[Instance]
    clutter: np.ndarray


def draw_scene(seed: int, split: str, index: int, size: tuple[int, int], max_size: tuple[int, int]) -> Scene:
    """Draw an image of several objects that partly occlude one another.

    Args:
        seed: 0 <= seed < 2**32.
        split: "train" or "val"; they share no random stream.
        index: Number of the image in its split, from 0. An image does not depend on how many are made.
        size, max_size: Least and greatest (height, width) in pixels; each side is drawn between them.
    """
    rng = ImageRng(seed, (0, SPLITS.index(split), index))
    height, width = (rng.integer(low, high) for low, high in zip(size, max_size, strict=True))
    canvas = _Canvas(rng, height, width)
    for _ in range(rng.integer(*_OBJECTS)):
        canvas.add_object()
    if rng.chance(_CROWD_CHANCE):
        canvas.add_crowd()
    return canvas.finish()


def draw_portrait(
    seed: int, split: str, index: int, label: int, size: tuple[int, int], max_size: tuple[int, int]
) -> Scene:
    """Draw an image of one large object of class `label`; the other arguments are those of `draw_scene`."""
    rng = ImageRng(seed, (1, SPLITS.index(split), index))
    height, width = (rng.integer(low, high) for low, high in zip(size, max_size, strict=True))
    canvas = _Canvas(rng, height, width)
    canvas.add_main_object(label)
    return canvas.finish()


class _Canvas:
    """Composes an image from front to back, so that each object's visible part is known when it is placed."""

    def __init__(self, rng: ImageRng, height: int, width: int) -> None:
        self.rng, self.height, self.width = rng, height, width
        self.shorter = min(height, width)
        self.image = np.zeros((height, width, 3))
        self.transmittance = np.ones((height, width))
        self.occupied = np.zeros((height, width), dtype=bool)
        self.instances: list[Instance] = []
        self.shapes: list[Shape] = []
        self.colours: list[Colour] = [muted_colour(rng)]

    def add_object(self) -> None:
        """Puts one object behind all others; it is left out where 30 draws find no place that shows enough of it."""
        rng = self.rng
        label = rng.integer(0, len(CLASSES) - 1)
        radius = 0.5 * self.shorter * rng.log_uniform(*_DIAMETERS)
        for _ in range(30):
            shape = make_shape(rng, label, *self._position(radius), radius)
            if self._place(shape):
                return

    def add_main_object(self, label: int) -> None:
        """Puts one large object about the middle."""
        rng = self.rng
        radius = 0.5 * self.shorter * rng.uniform(0.45, 0.9)
        room_x, room_y = 0.5 * self.width - 0.9 * radius, 0.5 * self.height - 0.9 * radius
        placed = False
        while not placed:
            x = 0.5 * self.width + rng.uniform(-room_x, room_x)
            y = 0.5 * self.height + rng.uniform(-room_y, room_y)
            placed = self._place(make_shape(rng, label, x, y, radius))

    def add_crowd(self) -> None:
        """Puts a dense group of tiny objects of one class behind all others, where at least eight of them show."""
        rng = self.rng
        label = rng.integer(0, len(CLASSES) - 1)
        spread = 0.13 * self.shorter
        x, y = rng.uniform(spread, self.width - spread), rng.uniform(spread, self.height - spread)
        taken = self.occupied.copy()
        members = []
        for _ in range(60):
            cos, sin = rng.direction()
            reach = spread * math.sqrt(rng.uniform())
            radius = 0.5 * self.shorter * rng.uniform(*_MEMBER_DIAMETERS)
            member = make_shape(rng, label, x + reach * cos, y + reach * sin, radius)
            window, distance = self._evaluate(member.distance, member.x, member.y, radius)
            inside = distance < 0
            if inside.any() and not (inside & taken[window]).any():
                taken[window] |= distance < 1
                members.append((window, distance))
        if len(members) < 8:
            return
        mask = np.zeros_like(self.occupied)
        colour = pick_colour(rng, self.colours, 0.3)
        for window, distance in members:
            mask[window] |= distance < 0
            self._paint(window, distance, shift_colour(rng, colour, 0.08))
        self.occupied |= mask
        self.instances.append(Instance(label, mask, crowd=True))

    def finish(self) -> Scene:
        """Add clutter, background, light and noise."""
        rng, height, width = self.rng, self.height, self.width
        before = self.transmittance.copy()
        for _ in range(rng.integer(0, 4)):
            self._add_line()
        for _ in range(rng.integer(0, 10)):
            self._add_dot()
        for _ in range(rng.integer(0, 3)):
            self._add_blob()
        clutter = (self.transmittance < 0.5 * before) & ~self.occupied
        image = self.image + self.transmittance[:, :, None] * self._background()
        cos, sin = rng.direction()
        x, y = np.arange(width)[None, :] / width - 0.5, np.arange(height)[:, None] / height - 0.5
        image *= (1.0 + rng.uniform(0.0, 0.3) * (x * cos + y * sin))[:, :, None]
        image += rng.uniform(0.0, 0.12) * (rng.array(height, width, 1) + rng.array(height, width, 1) - 1.0)
        image = np.floor(np.clip(image, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)
        return Scene(image, self.instances, clutter)

    def _position(self, radius: float) -> tuple[float, float]:
        rng = self.rng
        if self.shapes and rng.chance(0.45):
            other = rng.choice(self.shapes)
            cos, sin = rng.direction()
            reach = (radius + other.radius) * rng.uniform(0.35, 0.95)
            return other.x + reach * cos, other.y + reach * sin
        return rng.uniform(0.0, self.width), rng.uniform(0.0, self.height)

    def _place(self, shape: Shape) -> bool:
        # Draws the shape and notes its visible part, if enough of it can be seen.
        window, distance = self._evaluate(shape.distance, shape.x, shape.y, shape.radius)
        if distance.size == 0:
            return False
        visible = (distance < 0) & ~self.occupied[window]
        rows, columns = np.flatnonzero(visible.any(axis=1)), np.flatnonzero(visible.any(axis=0))
        if rows.size == 0 or min(rows[-1] - rows[0], columns[-1] - columns[0]) + 1 < _MIN_SIDE:
            return False
        if np.count_nonzero(visible) < _MIN_SHARE * _full_area(shape):
            return False
        if any(part.area < _MIN_PART for part in trace(visible) if not part.hole):
            return False
        mask = np.zeros_like(self.occupied)
        mask[window] = visible
        self.instances.append(Instance(shape.label, mask))
        near = [
            colour
            for other, colour in zip(self.shapes, self.colours[1:], strict=True)
            if _reach(other, shape) < 1.1 * (other.radius + shape.radius)
        ]
        colour = pick_colour(self.rng, [self.colours[0], *near], 0.35)
        self.shapes.append(shape)
        self.colours.append(colour)
        self._paint(window, distance, colour)
        self.occupied[window] |= visible
        return True

    def _evaluate(
        self, distance: Distance, x: float, y: float, radius: float
    ) -> tuple[tuple[slice, slice], np.ndarray]:
        # Signed distances within the part of the image that the shape can touch.
        rows = slice(max(0, math.floor(y - radius) - 1), max(0, min(self.height, math.ceil(y + radius) + 1)))
        columns = slice(max(0, math.floor(x - radius) - 1), max(0, min(self.width, math.ceil(x + radius) + 1)))
        grid_x, grid_y = np.arange(columns.start, columns.stop), np.arange(rows.start, rows.stop)
        return (rows, columns), distance(grid_x[None, :] + 0.5, grid_y[:, None] + 0.5)

    def _paint(self, window: tuple[slice, slice], distance: np.ndarray, colour: Colour) -> None:
        rng = self.rng
        height, width = distance.shape
        second = shift_colour(rng, colour, rng.uniform(0.12, 0.3))
        period = max(4.0, rng.uniform(0.12, 0.3) * max(height, width))
        self._blend(
            window,
            np.clip(0.5 - distance, 0.0, 1.0),
            texture(rng, rng.choice(TEXTURES), height, width, (colour, second), period),
        )

    def _blend(self, window: tuple[slice, slice], opacity: np.ndarray, colour: np.ndarray) -> None:
        passed = self.transmittance[window]
        self.image[window] += (passed * opacity)[:, :, None] * colour
        self.transmittance[window] = passed * (1.0 - opacity)

    def _add_line(self) -> None:
        rng = self.rng
        start = (rng.uniform(0.0, self.width), rng.uniform(0.0, self.height))
        end = (rng.uniform(0.0, self.width), rng.uniform(0.0, self.height))
        thickness = 0.01 * self.shorter * rng.uniform(0.7, 1.5)
        radius = 0.5 * math.hypot(end[0] - start[0], end[1] - start[1]) + thickness
        centre = 0.5 * (start[0] + end[0]), 0.5 * (start[1] + end[1])
        window, distance = self._evaluate(segment_distance(start, end, thickness), *centre, radius)
        opacity = np.clip(0.5 - distance, 0.0, 1.0) * min(1.0, thickness)
        self._blend(window, opacity, np.array(muted_colour(rng)))

    def _add_dot(self) -> None:
        rng = self.rng
        x, y = rng.uniform(0.0, self.width), rng.uniform(0.0, self.height)
        thickness = 0.01 * self.shorter * rng.uniform(1.0, 2.5)
        window, distance = self._evaluate(segment_distance((x, y), (x, y), thickness), x, y, thickness)
        self._blend(window, np.clip(0.5 - distance, 0.0, 1.0), np.array(muted_colour(rng)))

    def _add_blob(self) -> None:
        # A smear without an edge, stretched along a random direction.
        rng = self.rng
        x, y = rng.uniform(0.0, self.width), rng.uniform(0.0, self.height)
        cos, sin = rng.direction()
        radius = self.shorter * rng.uniform(0.08, 0.25)
        stretch = rng.uniform(1.0, 3.0)

        def squared(grid_x: np.ndarray, grid_y: np.ndarray) -> np.ndarray:
            along = (grid_x - x) * cos + (grid_y - y) * sin
            across = ((grid_y - y) * cos - (grid_x - x) * sin) * stretch
            return (along * along + across * across) / (radius * radius)

        window, share = self._evaluate(squared, x, y, radius)
        falloff = np.clip(1.0 - share, 0.0, 1.0)
        self._blend(window, rng.uniform(0.4, 0.9) * falloff * falloff, np.array(muted_colour(rng)))

    def _background(self) -> np.ndarray:
        rng, height, width = self.rng, self.height, self.width
        field = self._background_texture(self.colours[0])
        if rng.chance(0.35):
            # A second surface beyond a wavy border.
            cos, sin = rng.direction()
            x, y = np.arange(width)[None, :] - 0.5 * width, np.arange(height)[:, None] - 0.5 * height
            wave = (value_noise(rng, height, width, 0.3 * self.shorter) - 0.5) * 0.4 * self.shorter
            side = x * cos + y * sin + wave + rng.uniform(-0.3, 0.3) * self.shorter
            weight = np.clip(0.5 + side, 0.0, 1.0)[:, :, None]
            other = self._background_texture(shift_colour(rng, self.colours[0], rng.uniform(0.08, 0.2)))
            field = field + weight * (other - field)
        return field

    def _background_texture(self, colour: Colour) -> np.ndarray:
        rng = self.rng
        second = shift_colour(rng, colour, rng.uniform(0.05, 0.16))
        period = max(4.0, self.shorter * rng.uniform(0.05, 0.3))
        return texture(rng, rng.choice(TEXTURES), self.height, self.width, (colour, second), period)


def _full_area(shape: Shape) -> int:
    # Pixels of the whole shape, hidden and outside parts included.
    reach = math.ceil(shape.radius) + 1
    grid = np.arange(-reach, reach + 1) + 0.5
    distance = shape.distance(math.floor(shape.x) + grid[None, :], math.floor(shape.y) + grid[:, None])
    return int(np.count_nonzero(distance < 0))


def _reach(one: Shape, other: Shape) -> float:
    return math.hypot(one.x - other.x, one.y - other.y)
