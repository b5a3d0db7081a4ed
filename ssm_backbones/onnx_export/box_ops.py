"""Suppression of boxes and RoIAlign as operators that a graph with open sizes can hold.

Neither has a result whose size depends on values: boxes are marked rather than removed. mmcv's kernels compute them in
PyTorch, and ONNX's ``NonMaxSuppression`` and ``RoiAlign`` in a graph.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library('ssm_export', 'FRAGMENT')
_LIBRARY.define('kept_boxes(Tensor boxes, Tensor scores, float iou_threshold, int count) -> Tensor')
_LIBRARY.define(
    'roi_align(Tensor maps, Tensor rois, int height, int width, float spatial_scale, int sampling_ratio, bool aligned)'
    ' -> Tensor'
)


@torch.library.impl('ssm_export::kept_boxes', 'CompositeExplicitAutograd', lib=_LIBRARY)
def _kept_boxes(boxes: Tensor, scores: Tensor, iou_threshold: float, count: int) -> Tensor:
    """Mark the boxes that non-maximum suppression keeps.

    Args:
        boxes: Left, top, right and bottom, (B, N, 4).
        scores: (B, N); boxes with a score of 0 or less are never kept.
        iou_threshold: Boxes that overlap more with one of a higher score are suppressed.
        count: Largest number of boxes to keep of each image.

    Returns:
        1.0 for the kept boxes and 0.0 for others, (B, N).
    """
    nms = importlib.import_module('mmcv.ops').nms
    kept = torch.zeros_like(scores)
    for own, marks, each in zip(scores, kept, boxes, strict=True):
        candidates = (own > 0).nonzero()[:, 0]
        if len(candidates):
            chosen = nms(each[candidates].contiguous(), own[candidates].contiguous(), iou_threshold)[1]
            marks[candidates[chosen[:count]]] = 1.0
    return kept


@torch.library.register_fake('ssm_export::kept_boxes', lib=_LIBRARY)
def _(boxes: Tensor, scores: Tensor, iou_threshold: float, count: int) -> Tensor:
    return torch.empty_like(scores, memory_format=torch.contiguous_format)


@torch.library.impl('ssm_export::roi_align', 'CompositeExplicitAutograd', lib=_LIBRARY)
def _roi_align(
    maps: Tensor, rois: Tensor, height: int, width: int, spatial_scale: float, sampling_ratio: int, aligned: bool
) -> Tensor:
    """Average the maps (B, C, H, W) within the cells of regions (R, 5): (R, C, height, width).

    Args:
        maps: Feature maps.
        rois: Number of the image, left, top, right and bottom in pixels of the images.
        height, width: Cells of a region.
        spatial_scale: Size of the maps relative to the images.
        sampling_ratio: Samples along each side of a cell; 0 takes as many as the cell has pixels.
        aligned: Whether pixel centres are half a pixel from the map's border.
    """
    pool = importlib.import_module('mmcv.ops').roi_align
    return pool(maps.contiguous(), rois, (height, width), spatial_scale, sampling_ratio, 'avg', aligned)


@torch.library.register_fake('ssm_export::roi_align', lib=_LIBRARY)
def _(
    maps: Tensor, rois: Tensor, height: int, width: int, spatial_scale: float, sampling_ratio: int, aligned: bool
) -> Tensor:
    return maps.new_empty((rois.shape[0], maps.shape[1], height, width))


kept_boxes = torch.ops.ssm_export.kept_boxes
roi_align = torch.ops.ssm_export.roi_align


def translations() -> dict[Any, Callable[..., Any]]:
    """Return both operators in ONNX, for ``torch.onnx.export(custom_translation_table=...)``."""
    return {
        torch.ops.ssm_export.kept_boxes.default: _onnx_kept_boxes,
        torch.ops.ssm_export.roi_align.default: _onnx_roi_align,
    }


def _onnx_kept_boxes(boxes: Any, scores: Any, iou_threshold: float, count: int) -> Any:
    from onnxscript import opset18 as op  # which is told to be missing when an export begins

    limits = op.Constant(value_ints=[count]), op.Constant(value_floats=[iou_threshold]), op.Constant(value_floats=[0.0])
    chosen = op.NonMaxSuppression(boxes, op.Unsqueeze(scores, op.Constant(value_ints=[1])), *limits)
    # Image, class and box of each.
    places = op.Gather(chosen, op.Constant(value_ints=[0, 2]), axis=1)
    ones = op.Expand(
        op.Constant(value_floats=[1.0]),
        op.Gather(op.Shape(chosen), op.Constant(value_ints=[0]), axis=0),
    )
    return op.ScatterND(op.Sub(scores, scores), places, ones)


def _onnx_roi_align(
    maps: Any, rois: Any, height: int, width: int, spatial_scale: float, sampling_ratio: int, aligned: bool
) -> Any:
    from onnxscript import opset18 as op

    image, box = (op.Gather(rois, op.Constant(value_ints=each), axis=1) for each in ([0], [1, 2, 3, 4]))
    return op.RoiAlign(
        maps,
        box,
        op.Cast(op.Squeeze(image, op.Constant(value_ints=[1])), to=7),
        coordinate_transformation_mode='half_pixel' if aligned else 'output_half_pixel',
        output_height=height,
        output_width=width,
        sampling_ratio=sampling_ratio,
        spatial_scale=spatial_scale,
    )
