"""Comparison of a detector's objects in onnxruntime with PyTorch's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ssm_backbones.onnx_export.detector import OUTPUTS, Detector
from ssm_backbones.utils.errors import CommandError

TOLERANCE = 0.02
"""Share of objects that may have no counterpart: a rounding can decide which of two boxes suppresses the other."""
_PIXELS, _SCORE, _MASK = 0.05, 1e-3, 0.02


@dataclass(frozen=True)
class Detections:
    """Result of a comparison.

    Attributes:
        objects: Number of PyTorch's objects.
        unmatched: Share of both runtimes' objects for which the other has none of the same class, box, score and mask.
    """

    objects: int
    unmatched: dict[str, float]


def compare(session: Any, module: Detector, images: Sequence[int] | Tensor) -> Detections:
    """Compare the objects in images (B, C, H, W), or in coloured squares of a shape.

    Raises:
        CommandError: If onnxruntime rejects the images.
    """
    if not isinstance(images, Tensor):
        cells = *images[:2], *(-(-side // 16) for side in images[2:])
        squares = torch.rand(*cells, generator=torch.Generator().manual_seed(1))
        images = 255 * F.interpolate(squares, scale_factor=16.0)[:, :, : images[2], : images[3]]
    shape = images.shape
    try:
        found = session.run(list(OUTPUTS[: len(session.get_outputs())]), {'images': images.numpy()})
    except Exception as error:
        # onnxruntime's errors have no other common base class.
        raise CommandError(f'onnxruntime fails for images {tuple(shape)}: {str(error).strip()}') from error
    with torch.inference_mode():
        expected = [each.numpy() for each in module(images)]
    missing, count, objects = 0, 0, 0
    for image in range(shape[0]):
        ours, theirs = ([each[image] for each in outputs] for outputs in (expected, found))
        missing += unmatched(ours, theirs) + unmatched(theirs, ours)
        objects += int((ours[1] > 0).sum())
        count += int((ours[1] > 0).sum() + (theirs[1] > 0).sum())
    return Detections(objects, {'objects without a counterpart': missing / count if count else 0.0})


def unmatched(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> int:
    """Count the objects of one image for which the others have none alike.

    Args:
        ours: Boxes (n, 4), scores (n), classes (n) and perhaps masks (n, h, w), as :class:`Detector` returns them.
        theirs: The same of another runtime.
    """
    boxes, scores, labels = theirs[:3]
    missing = 0
    for place in np.flatnonzero(ours[1] > 0):
        alike = (np.abs(boxes - ours[0][place]) <= _PIXELS).all(1) & (np.abs(scores - ours[1][place]) <= _SCORE)
        alike &= (labels == ours[2][place]) & (scores > 0)
        if len(ours) > 3:
            alike &= (np.abs(theirs[3] - ours[3][place]) <= _MASK).all((1, 2))
        missing += not alike.any()
    return missing
