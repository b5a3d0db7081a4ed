"""Reproducible random numbers: one independent stream for each image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar('T')


class ImageRng:
    """Random draws for one image.

    Everything is derived from uniform doubles, whose stream numpy keeps stable, and no draw depends on other
    images. Transcendental functions are rounded, so that another libm gives the same image.

    Args:
        seed: 0 <= seed < 2**32.
        key: Non-negative integers that name the image, such as (kind, split, index).
    """

    def __init__(self, seed: int, key: Sequence[int]) -> None:
        sequence = np.random.SeedSequence(seed, spawn_key=tuple(key))
        self._random = np.random.Generator(np.random.PCG64(sequence)).random

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """Draw a float in [low, high)."""
        return low + (high - low) * float(self._random())

    def log_uniform(self, low: float, high: float) -> float:
        """Draw a float in [low, high) whose logarithm is uniform."""
        return round(low * (high / low) ** self.uniform(), 6)

    def integer(self, low: int, high: int) -> int:
        """Draw an integer in [low, high], both ends included."""
        return low + int(self._random() * (high - low + 1))

    def chance(self, probability: float) -> bool:
        """True with the given probability."""
        return float(self._random()) < probability

    def choice(self, options: Sequence[T]) -> T:
        """Draw one of the options, all equally likely."""
        return options[self.integer(0, len(options) - 1)]

    def direction(self) -> tuple[float, float]:
        """Cosine and sine of a random angle."""
        return unit_vector(self.uniform(0.0, 360.0))

    def array(self, *shape: int) -> np.ndarray:
        """Draw a float64 array of the shape, uniform in [0, 1)."""
        return self._random(shape)


def unit_vector(degrees: float) -> tuple[float, float]:
    """Cosine and sine of the angle, rounded to nine digits so that they do not depend on the platform's libm."""
    radians = math.radians(degrees)
    return round(math.cos(radians), 9), round(math.sin(radians), 9)
