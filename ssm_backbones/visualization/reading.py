"""Read images as a config's model receives them, and as they look before normalisation."""

from __future__ import annotations

import os
from copy import deepcopy
from typing import Any, NamedTuple

import numpy as np
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.registry import TRANSFORMS, DefaultScope
from torch import Tensor

from ssm_backbones.apis.images import MAX_PIXELS, UnreadableImage, check_readable, test_pipeline
from ssm_backbones.apis.model import FeatureExtractor
from ssm_backbones.utils.errors import CommandError

# Parts of the names of transforms that resize, crop or pad.
_GEOMETRIC = ('Resize', 'Crop', 'Pad', 'Flip')


class Given(NamedTuple):
    """An image after a config's preprocessing.

    Attributes:
        shown: uint8 (H, W, 3), RGB, for drawing: after the pipeline with its cropping, before normalisation.
        image: float32 (1, C, H, W), normalised, for the backbone. Without the padding that some libraries add at the
            bottom and right for batches and necks: the backbones take any size.
    """

    shown: np.ndarray
    image: Tensor


class ImageReader:
    """Read images through a config's test pipeline and data preprocessor.

    Args:
        cfg: The config.
        extractor: The extractor whose preprocessing is used.
        size: Height and width that images are resized to, instead of the pipeline's resizing, cropping and padding;
            None keeps the pipeline.
        max_pixels: Larger images are rejected.

    Raises:
        CommandError: If the config has no test pipeline, or the size is not positive.
    """

    def __init__(
        self,
        cfg: Config,
        extractor: FeatureExtractor,
        size: tuple[int, int] | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.extractor, self.max_pixels = extractor, max_pixels
        pipeline = test_pipeline(cfg)
        if size is not None:
            if min(size) < 1:
                raise CommandError(f'size must be at least 1 1, got {size[0]} {size[1]}.')
            pipeline = _resized(pipeline, size)
        with DefaultScope.overwrite_default_scope(cfg.default_scope):
            self.pipeline = Compose([TRANSFORMS.build(step) for step in pipeline])

    def __call__(self, path: str | os.PathLike[str]) -> Given:
        """Read one image.

        Raises:
            CommandError: If the file cannot be read.
        """
        try:
            check_readable(os.fspath(path), self.max_pixels)
            data = self.pipeline(dict(img_path=os.fspath(path), img_id=0, sample_idx=0, seg_fields=[]))
        except UnreadableImage as error:
            raise CommandError(f'image {path} cannot be read: {error}.') from error
        except Exception as error:
            # Decoders and transforms raise arbitrary errors for damaged files.
            reason = f'{type(error).__name__}: {str(error).strip()}'
            raise CommandError(f'image {path} cannot be read: {reason}') from error
        inputs = data['inputs']
        image = self.extractor.preprocess(dict(inputs=[inputs], data_samples=[data['data_samples']]))
        return Given(as_rgb(inputs), image[:, :, : inputs.shape[1], : inputs.shape[2]])


def as_rgb(inputs: Tensor) -> np.ndarray:
    """Convert a packed image (C, H, W) to uint8 (H, W, 3), RGB, for drawing. See :func:`array_as_rgb`."""
    return array_as_rgb(inputs.permute(1, 2, 0).cpu().numpy())


def array_as_rgb(image: np.ndarray) -> np.ndarray:
    """Convert a loaded image (H, W) or (H, W, C) to uint8 (H, W, 3), RGB, for drawing.

    Three channels are BGR, as mmcv reads; fewer become grey; of more, the first three are taken. Other values than
    uint8 are stretched to 0..255.
    """
    image = image if image.ndim == 3 else image[:, :, None]
    if image.shape[2] == 3:
        image = image[:, :, ::-1]
    elif image.shape[2] < 3:
        image = np.repeat(image[:, :, :1], 3, axis=2)
    colours = image[:, :, :3]
    if colours.dtype == np.uint8:
        return np.ascontiguousarray(colours)
    low, high = float(colours.min()), float(colours.max())
    stretched = np.round((colours - low) * (255 / max(high - low, 1e-12)))
    # OpenCV draws on contiguous images alone; bands that came first in a file are not.
    return np.ascontiguousarray(stretched, np.uint8)


def _resized(pipeline: list[dict[str, Any]], size: tuple[int, int]) -> list[dict[str, Any]]:
    """Replace all resizing, cropping and padding of a pipeline by one resizing after loading."""
    kept = [deepcopy(step) for step in pipeline if not any(part in str(step['type']) for part in _GEOMETRIC)]
    loading = max((place for place, step in enumerate(kept) if 'Load' in str(step['type'])), default=-1)
    kept.insert(loading + 1, dict(type='Resize', scale=(size[1], size[0])))
    return kept
