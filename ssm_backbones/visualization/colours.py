"""Colour a feature map by its principal components."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

# torch.quantile takes at most 2^24 values; a sample of pixels determines a component's range.
_SAMPLES = 1_000_000


def pca_colours(features: Tensor) -> np.ndarray:
    """Map the first three principal components of a feature map to red, green and blue.

    Args:
        features: Feature map (C, H, W) of any floating dtype.

    Returns:
        uint8 (H, W, 3). Colours are comparable within a map, not between maps. If the map has fewer than three
        components, the other channels are grey.
    """
    channels, height, width = features.shape
    pixels = features.float().flatten(1).t()
    pixels = pixels - pixels.mean(0)
    # The covariance is small however large the map is.
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
