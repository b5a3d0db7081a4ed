"""Effective receptive fields: how far and how strongly the pixels of an image reach the centre of a feature map.

Source: Luo et al., "Understanding the Effective Receptive Field in Deep Convolutional Neural Networks", NeurIPS 2016
(arXiv 1701.04128), averaged over images and drawn on a logarithmic scale as RepLKNet (Ding et al., arXiv 2203.06717)
and VMamba (Liu et al., arXiv 2401.10166) do. Those take the gradient of the positive values only; here all values count
by their magnitude, so that every map has a field.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ssm_backbones.backbones.base import SSMBackbone
from ssm_backbones.visualization.stages import cell_centre, evaluating, resolve_stage, stage_maps


@dataclass(frozen=True)
class ReceptiveField:
    """An effective receptive field.

    Attributes:
        field: float64 (H, W), at least 0: the contribution of each pixel of the image, averaged over images.
        centre: Row and column of the image at which the output pixel is centred; whole or half numbers.
        images: Number of images averaged over.
    """

    field: np.ndarray
    centre: tuple[float, float]
    images: int

    def curve(self) -> tuple[np.ndarray, np.ndarray]:
        """Compute the share of the contribution within centred squares.

        Returns:
            Sides of the squares in pixels, ascending, and the share (0..1) of the total contribution within each. A
            pixel counts for squares that contain it entirely.
        """
        rows, columns = np.ogrid[: self.field.shape[0], : self.field.shape[1]]
        distance = np.maximum(abs(rows - self.centre[0]), abs(columns - self.centre[1]))
        sides, place = np.unique(2 * distance + 1, return_inverse=True)
        rings = np.bincount(place.ravel(), weights=self.field.ravel(), minlength=len(sides))
        return sides, np.cumsum(rings) / rings.sum()

    def side(self, share: float) -> float:
        """Return the side in pixels of the smallest centred square with ``share`` (0..1) of the contribution."""
        if not 0 < share <= 1:
            raise ValueError(f'a share lies in (0, 1], got {share!r}.')
        sides, shares = self.curve()
        # The last share is 1 except for rounding.
        return float(sides[min(int(np.searchsorted(shares, share - 1e-9)), len(sides) - 1)])


def effective_receptive_field(
    model: nn.Module, images: Tensor | Iterable[Tensor], stage: int | None = None
) -> np.ndarray:
    """Compute the effective receptive field of the centre of a stage's map; see :func:`receptive_field`.

    Returns:
        float64 (H, W): the mean over the images of ``sum_k |d(sum_c |y_c|) / dx_k|``, with y the map's pixel (h // 2,
        w // 2) and k the channels of the image.
    """
    return receptive_field(model, images, stage).field


def receptive_field(model: nn.Module, images: Tensor | Iterable[Tensor], stage: int | None = None) -> ReceptiveField:
    """Compute the effective receptive field of the centre of a stage's map, and the centre's place in the image.

    Args:
        model: A backbone of this package, whose map after the blocks of the stage, before its norm, is used; or any
            other module from images to a map (B, C, h, w) or a sequence of maps.
        images: Preprocessed images (B, in_channels, H, W), or an iterable of such batches, all of one H and W.
            Gradients are computed for one image at a time.
        stage: Number of the stage; negative ones count from the end, None is the last one.

    Raises:
        ValueError: If there is no such stage, there are no images, their sizes differ, or the gradient is not finite or
            zero everywhere.
    """
    total: np.ndarray | None = None
    count = 0
    centre = (0.0, 0.0)
    with evaluating(model), torch.enable_grad():
        for batch in [images] if isinstance(images, Tensor) else images:
            for image in batch:
                gradient, centre = _gradient(model, image.unsqueeze(0), stage)
                if total is not None and gradient.shape != total.shape:
                    raise ValueError(
                        f'the images differ in size: {_size(total)} and {_size(gradient)}; bring them to '
                        'one size, for which the field is averaged.'
                    )
                total = gradient if total is None else total + gradient
                count += 1
    if total is None:
        raise ValueError('there are no images to average the receptive field over.')
    if not np.isfinite(total).all():
        raise ValueError('the gradient is not finite: the weights are damaged, or the images.')
    if total.max() == 0:
        raise ValueError('no pixel of the images reaches the centre of the map: the gradient is zero everywhere.')
    return ReceptiveField(total / count, centre, count)


def _gradient(model: nn.Module, image: Tensor, stage: int | None) -> tuple[np.ndarray, tuple[float, float]]:
    """Compute the absolute gradient (H, W) of one image (1, C, H, W), and the centre."""
    image = image.detach().clone().requires_grad_()
    if isinstance(model, SSMBackbone):
        number = resolve_stage(model, stage)
        value = stage_maps(model, image, [number])[number]
    else:
        outputs = model(image)
        value = outputs if isinstance(outputs, Tensor) else outputs[-1 if stage is None else stage]
    row, column = value.shape[2] // 2, value.shape[3] // 2
    gradient = torch.autograd.grad(value[0, :, row, column].abs().sum(), image)[0]
    if isinstance(model, SSMBackbone):
        centre = (cell_centre(model, number, row), cell_centre(model, number, column))
    else:
        step_down, step_right = (size / cells for size, cells in zip(image.shape[2:], value.shape[2:], strict=True))
        centre = (row + 0.5) * step_down - 0.5, (column + 0.5) * step_right - 0.5
    return gradient[0].double().abs().sum(0).cpu().numpy(), centre


def _size(field: np.ndarray) -> str:
    return f'{field.shape[1]}x{field.shape[0]}'
