"""Load images of any number of bands: TIFFs and NumPy arrays, as remote sensing and microscopy have them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ssm_backbones.utils.arrays import bands_last, read_array
from ssm_backbones.utils.mm import TRANSFORMS


@TRANSFORMS.register_module()
class LoadBands:
    """Load a TIFF (.tif, .tiff) or an array (.npy) of any number of bands and any real dtype, in any pipeline.

    It takes the place of ``LoadImageFromFile``, which reads 8 bits and three bands. The image becomes float32 (H, W,
    bands), normalised where means are given, since mmdet's data preprocessor takes one mean or three. Bands may come
    first or last in the file. Adds ``img``, ``img_shape`` and ``ori_shape`` to the results.

    Args:
        bands: Number of bands.
        mean: Mean of each band, which is subtracted; None leaves the values as they are.
        std: Standard deviation of each band, by which the difference is divided; it goes with ``mean``.

    Raises:
        ValueError: If there are not as many means and deviations as bands, or a deviation is not positive.
    """

    def __init__(self, bands: int, mean: Sequence[float] | None = None, std: Sequence[float] | None = None) -> None:
        if bands < 1:
            raise ValueError(f'bands must be at least 1, got {bands}.')
        if (mean is None) != (std is None):
            raise ValueError('mean and std go together: give both or neither.')
        for name, values in (('mean', mean), ('std', std)):
            if values is not None and len(values) != bands:
                raise ValueError(f'{name} must have a value for each of {bands} bands, got {len(values)}.')
        if std is not None and min(std) <= 0:
            raise ValueError(f'std must be positive, got {list(std)}.')
        self.bands = bands
        self.mean = None if mean is None else np.asarray(mean, np.float32)
        self.std = None if std is None else np.asarray(std, np.float32)

    def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
        """Load ``results['img_path']``.

        Raises:
            CommandError: If the file cannot be read or has another number of bands. The message names it.
        """
        path = results['img_path']
        image = np.ascontiguousarray(bands_last(read_array(path), self.bands, path), np.float32)
        if self.mean is not None and self.std is not None:
            image = (image - self.mean) / self.std
        results.update(img=image, img_shape=image.shape[:2], ori_shape=image.shape[:2])
        return results

    def __repr__(self) -> str:
        return f'{type(self).__name__}(bands={self.bands})'
