"""Read images of any number of bands as arrays."""

from __future__ import annotations

import numpy as np

from ssm_backbones.utils.errors import CommandError


def read_array(path: str) -> np.ndarray:
    """Read a TIFF or .npy file as it is.

    Raises:
        CommandError: If it cannot be read. The message names the file and the reason.
    """
    try:
        if path.lower().endswith('.npy'):
            return np.load(path)
        try:
            import tifffile
        except ImportError as error:
            raise CommandError(f'image {path} is read by tifffile: pip install tifffile') from error
        return tifffile.imread(path)
    except CommandError:
        raise
    except Exception as error:
        # Decoders raise arbitrary errors for damaged files.
        raise CommandError(f'image {path} cannot be read ({type(error).__name__}: {str(error).strip()}).') from error


def bands_last(image: np.ndarray, bands: int | None = None, path: str = '') -> np.ndarray:
    """Return an image (H, W), (H, W, bands) or (bands, H, W) as (H, W, bands).

    Args:
        image: The array.
        bands: The number of bands; None takes the shorter of the first and the last side for the bands.
        path: The file, for messages.

    Raises:
        CommandError: If the array is no image of that number of bands.
    """
    image = image[:, :, None] if image.ndim == 2 else image
    if image.ndim != 3:
        raise CommandError(f'image {path} is an array of shape {image.shape}; expected (H, W), (H, W, C) or (C, H, W).')
    if bands is None:
        bands = min(image.shape[0], image.shape[2])
    if image.shape[2] == bands:
        return image
    if image.shape[0] == bands:
        return np.moveaxis(image, 0, 2)
    raise CommandError(f'image {path} has the shape {image.shape}; expected {bands} bands, first or last.')
