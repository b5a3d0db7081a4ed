"""Find out whether images need a loader of their own, and their bands' means and deviations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ssm_backbones.utils.arrays import bands_last, read_array
from ssm_backbones.utils.errors import CommandError

# Pixels of each image that enter the statistics.
_PIXELS = 20_000


@dataclass(frozen=True)
class Bands:
    """Number, means and deviations of the bands of images that ``LoadImageFromFile`` does not read as they are."""

    count: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def find_bands(paths: Sequence[Path]) -> Bands | None:
    """Look at some images.

    Args:
        paths: Images of one kind.

    Returns:
        None for images of 8 bits and up to three channels, which the usual loader reads.

    Raises:
        CommandError: If images differ in their number of bands, or cannot be read.
    """
    suffixes = {path.suffix.lower() for path in paths}
    if not suffixes & {'.npy', '.tif', '.tiff'}:
        return None
    if suffixes <= {'.tif', '.tiff'} and all(map(_is_usual, paths)):
        return None
    generator = np.random.default_rng(0)
    counts: dict[int, Path] = {}
    pixels = []
    for path in paths:
        image = bands_last(read_array(str(path)), path=str(path))
        counts.setdefault(image.shape[2], path)
        values = image.reshape(-1, image.shape[2])
        pixels.append(values[generator.integers(0, len(values), min(len(values), _PIXELS))].astype(np.float64))
    if len(counts) > 1:
        told = ', '.join(f'{count} in {path}' for count, path in counts.items())
        raise CommandError(f'the images differ in their number of bands: {told}.')
    together = np.concatenate(pixels)
    # A band of one value is left at 0.
    deviations = np.maximum(together.std(axis=0), 1e-6)
    return Bands(together.shape[1], _rounded(together.mean(axis=0)), _rounded(deviations))


def _is_usual(path: Path) -> bool:
    """Return whether Pillow opens a TIFF as 8 bits of one to three channels."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.mode in ('1', 'L', 'P', 'RGB')
    except OSError:
        return False


def _rounded(values: np.ndarray) -> tuple[float, ...]:
    return tuple(float(f'{value:.6g}') for value in values)
