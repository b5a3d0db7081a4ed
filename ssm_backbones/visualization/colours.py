"""Colour a feature map by its principal components."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

# torch.quantile takes no more than 2^24 values; so many pixels tell a component's range.
_SAMPLES = 1_000_000


def pca_colours(features: Tensor) -> np.ndarray:
    """Turn the first three principal components of a map into red, green and blue.

    Args:
        features: (C, H, W), floating-point, of any dtype.

    Returns:
        uint8 (H, W, 3). The colours of one map tell what is alike in it; those of two maps are not comparable. A map of
        fewer than three components leaves the other colours grey.
    """
    channels, height, width = features.shape
    pixels = features.float().flatten(1).t()
    pixels = pixels - pixels.mean(0)
    # Through the covariance, which is small however large the map is.
    values, vectors = torch.linalg.eigh((pixels.t() @ pixels).double() / max(len(pixels) - 1, 1))
    basis = vectors[:, values.argsort(descending=True)[:3]]
    # A component's sign is arbitrary: the largest weight is made positive, so that drawing twice gives one image.
    largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))
    projected = pixels.double() @ (basis * torch.where(largest < 0, -1.0, 1.0))
    sample = projected[:: -(-len(projected) // _SAMPLES)]
    low, high = (torch.quantile(sample, q, dim=0) for q in (0.02, 0.98))
    spread = high - low
    flat = spread < 1e-9
    scaled = torch.where(flat, 0.5, ((projected - low) / spread.where(~flat, torch.ones(()).double())).clamp(0, 1))
    colours = torch.full((len(pixels), 3), 0.5, dtype=torch.float64)
    colours[:, : scaled.shape[1]] = scaled
    return (colours * 255).round().to(torch.uint8).view(height, width, 3).numpy()
