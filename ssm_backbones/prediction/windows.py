"""Divide a huge image into overlapping windows, and put what is predicted in each of them together.

Each pixel belongs to the core of one window: the cores meet in the middle of the overlaps. A label map takes each
pixel from the window of its core, and an object from the window in whose core the centre of its box lies. An object no
larger than the overlap is thereby found whole, and once: in the window of its core it is not cut, and what a neighbour
sees of it has its centre outside of that neighbour's core.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class Span:
    """A window along one axis, in pixels: ``start`` to ``stop``, and its core ``inner`` to ``outer``."""

    start: int
    stop: int
    inner: int
    outer: int


@dataclass(frozen=True)
class Window:
    """A window of an image: its rows and its columns."""

    rows: Span
    columns: Span


def spans(length: int, window: int, overlap: int) -> list[Span]:
    """Divide an axis into windows of one length that overlap by ``overlap`` pixels or a little more.

    Args:
        length: Length of the axis, at least 1.
        window: Length of a window; an axis that is no longer is one window.
        overlap: Least overlap of neighbours, less than ``window``.
    """
    if length <= window:
        return [Span(0, length, 0, length)]
    count = -(-(length - overlap) // (window - overlap))
    starts = [round(place * (length - window) / (count - 1)) for place in range(count)]
    edges = [0, *((start + before + window) // 2 for before, start in zip(starts, starts[1:], strict=False)), length]
    return [Span(start, start + window, edges[place], edges[place + 1]) for place, start in enumerate(starts)]


def windows(size: tuple[int, int], window: tuple[int, int], overlap: int) -> list[Window]:
    """Divide an image of a size (H, W) into windows of at most a size (H, W), row by row."""
    return [
        Window(rows, columns)
        for rows in spans(size[0], window[0], overlap)
        for columns in spans(size[1], window[1], overlap)
    ]


class Labels:
    """Label map of a huge image, put together from those of its windows.

    Args:
        size: Height and width of the image.
        num_classes: Number of classes; up to 256 take a byte a pixel.
    """

    def __init__(self, size: tuple[int, int], num_classes: int) -> None:
        self.map = torch.zeros(size, dtype=torch.uint8 if num_classes <= 256 else torch.int16)

    def add(self, window: Window, sample: Any) -> None:
        """Take a window's core from its mmseg sample."""
        rows, columns = window.rows, window.columns
        found = sample.pred_sem_seg.data[
            0,
            rows.inner - rows.start : rows.outer - rows.start,
            columns.inner - columns.start : columns.outer - columns.start,
        ]
        self.map[rows.inner : rows.outer, columns.inner : columns.outer] = found.to(self.map.dtype)

    def result(self) -> Any:
        """Return the mmseg sample of the whole image."""
        from mmengine.structures import PixelData
        from mmseg.structures import SegDataSample

        sample = SegDataSample(metainfo=dict(ori_shape=tuple(self.map.shape), img_shape=tuple(self.map.shape)))
        sample.pred_sem_seg = PixelData(data=self.map[None])
        return sample


class Objects:
    """Objects of a huge image, put together from those of its windows. Masks become COCO's compressed run lengths.

    Args:
        size: Height and width of the image.
        iou: Of two boxes of a class that overlap by more, the one with the lower score is left out.
    """

    def __init__(self, size: tuple[int, int], iou: float) -> None:
        self.size, self.iou = size, iou
        self._found: list[Any] = []

    def add(self, window: Window, sample: Any) -> None:
        """Take the objects whose boxes have their centre in a window's core from its mmdet sample."""
        found = sample.pred_instances.cpu()
        left, top = window.columns.start, window.rows.start
        across = (found.bboxes[:, 0] + found.bboxes[:, 2]) / 2 + left
        down = (found.bboxes[:, 1] + found.bboxes[:, 3]) / 2 + top
        # What reaches beyond the image belongs to the window at its edge.
        across, down = across.clamp(0, self.size[1] - 1e-3), down.clamp(0, self.size[0] - 1e-3)
        inside = (across >= window.columns.inner) & (across < window.columns.outer)
        inside &= (down >= window.rows.inner) & (down < window.rows.outer)
        found = found[inside]
        found.bboxes = found.bboxes + found.bboxes.new_tensor([left, top, left, top])
        if 'masks' in found:
            masks = found.pop('masks')
            found.masks = [run_lengths(mask.numpy(), (top, left), self.size) for mask in masks]
        self._found.append(found)

    def result(self) -> Any:
        """Return the mmdet sample of the whole image, with the highest scores first."""
        from mmcv.ops import batched_nms
        from mmdet.structures import DetDataSample

        found = type(self._found[0]).cat(self._found)
        if len(found):
            kind = dict(type='nms', iou_threshold=self.iou)
            _, kept = batched_nms(found.bboxes.float(), found.scores.float(), found.labels, kind)
            found = found[kept]
        sample = DetDataSample(metainfo=dict(ori_shape=self.size, img_shape=self.size))
        sample.pred_instances = found
        return sample


def run_lengths(mask: np.ndarray, origin: tuple[int, int], size: tuple[int, int]) -> dict[str, Any]:
    """Encode a mask that lies somewhere on a larger image, which itself is not allocated.

    Args:
        mask: Boolean (h, w).
        origin: Row and column of the mask's first pixel on the image.
        size: Height and width of the image.

    Returns:
        COCO's compressed run lengths, ``size`` and ``counts`` (a str).
    """
    from pycocotools import mask as coco

    height, width = size
    # Runs go down the columns. A step up or down at row r and column c is at c * height + r of the image.
    steps = np.diff(np.pad(mask.astype(np.int8), ((1, 1), (0, 0))), axis=0)
    columns, starts = np.nonzero((steps == 1).T)
    _, stops = np.nonzero((steps == -1).T)
    offsets = (columns + origin[1]) * height + origin[0]
    # A run that ends where the next one starts goes on, from the foot of one column to the head of the next.
    edges, times = np.unique(np.concatenate([starts + offsets, stops + offsets]), return_counts=True)
    edges = edges[times == 1]
    # After a run that ends with the image, no empty one follows.
    ends = edges if len(edges) and edges[-1] == height * width else [*edges, height * width]
    counts = np.diff([0, *ends]).tolist()
    encoded = coco.frPyObjects(dict(counts=counts, size=[height, width]), height, width)
    return dict(size=list(encoded['size']), counts=encoded['counts'].decode())


def check_window(window: Sequence[int], overlap: int) -> tuple[int, int]:
    """Return a window's height and width.

    Raises:
        ValueError: If the window is empty or not larger than the overlap.
    """
    if len(window) not in (1, 2):
        raise ValueError(f'window is a side, or height and width, got {list(window)}.')
    height, width = window[0], window[-1]
    if overlap < 0:
        raise ValueError(f'overlap must be at least 0, got {overlap}.')
    if min(height, width) <= overlap:
        raise ValueError(f'window must be larger than overlap={overlap}, got {height}x{width}.')
    return height, width
