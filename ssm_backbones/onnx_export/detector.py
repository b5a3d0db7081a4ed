"""mmdet's detectors as functions of pixels alone, whose results have sizes that do not depend on values.

Only what selects boxes is written anew; maps, scores, anchors and masks come from the model's own layers. Boxes that
are dropped on the way stay in their places with a score of -1. Supported are models of an RPN and a standard RoI head
(Faster R-CNN, Mask R-CNN) and those of one dense head with anchors (RetinaNet).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmengine.config import Config
from torch import Tensor, nn
from torch.nn import functional as F

from ssm_backbones.onnx_export.box_ops import kept_boxes, roi_align
from ssm_backbones.prediction.predictor import find_classes
from ssm_backbones.utils.errors import CommandError

OUTPUTS = ('boxes', 'scores', 'labels', 'masks')


class Detector(nn.Module):
    """A detector from pixels to boxes, and to masks if it has a mask head.

    Args:
        model: mmdet's model.

    Raises:
        CommandError: If a part of it is not supported. The message names the part.
    """

    mean: Tensor | None
    std: Tensor | None

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model: Any = model
        check_supported(model)
        settings = model.data_preprocessor
        self.divisor = settings.pad_size_divisor
        self.pad_value = float(settings.pad_value)
        # mmcv loads BGR, which a preprocessor may leave as it is.
        self.flip = not settings._channel_conversion and getattr(model.backbone, 'in_channels', 3) == 3
        self.register_buffer('mean', settings.mean if settings._enable_normalize else None, persistent=False)
        self.register_buffer('std', settings.std if settings._enable_normalize else None, persistent=False)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Detect objects in images of one size.

        Args:
            images: Pixels in RGB, 0 to 255, float32 (B, 3, H, W).

        Returns:
            - Left, top, right and bottom in pixels, (B, n, 4), by falling score; n is the config's ``max_per_img``.
            - Scores (B, n), 0 where there are fewer objects.
            - Classes, int64 (B, n), -1 where there are fewer objects.
            - With a mask head, probabilities of the class's pixels within the box, (B, n, h, w).
        """
        model = self.model
        size = images.shape[2:]
        maps = model.extract_feat(self._normalised(images))
        if not hasattr(model, 'roi_head'):
            return _finished(*_dense_boxes(model.bbox_head, maps, size))
        head = model.roi_head
        proposals, scores, _ = _dense_boxes(model.rpn_head, maps, size, proposals=True)
        boxes, scores, labels = _finished(*_regions(head, maps, proposals, scores, size))
        if not head.with_mask:
            return boxes, scores, labels
        return boxes, scores, labels, _masks(head, maps, boxes, labels)

    def notes(self, cfg: Config) -> dict[str, str]:
        """Return the metadata of an exported detector.

        Args:
            cfg: The config of the model.

        Returns:
            ``pixels``, ``classes`` (names, a list in JSON) and, with a mask head, ``mask_threshold``, from which
            on a probability is of the object.
        """
        classes = find_classes(cfg, self.model, {}).names
        notes = dict(part='detector', pixels='RGB, 0 to 255', classes=json.dumps(list(classes)))
        if getattr(self.model, 'with_mask', False):
            notes['mask_threshold'] = str(self.model.roi_head.test_cfg['mask_thr_binary'])
        return notes

    def _normalised(self, images: Tensor) -> Tensor:
        if self.flip:
            images = images.flip(1)
        if self.mean is not None and self.std is not None:
            images = (images - self.mean) / self.std
        height, width = images.shape[2:]
        # In this form, since PyTorch's exporter rounds -(-size // divisor) towards zero.
        missing = [(side + self.divisor - 1) // self.divisor * self.divisor - side for side in (width, height)]
        return F.pad(images, (0, missing[0], 0, missing[1]), value=self.pad_value)


def pixels(image: Tensor) -> Tensor:
    """Turn what mmcv loads, BGR (3, H, W) or more bands, into the input of a detector, float32 (1, 3, H, W)."""
    # Bands that are no colours stay in their order.
    return (image.flip(0) if len(image) == 3 else image).float()[None]


def check_supported(model: Any) -> None:
    """Refuse detectors that :class:`Detector` does not compute.

    Raises:
        CommandError: If there is a part that it does not compute. The message names it.
    """
    reasons = list(_unsupported(model))
    if reasons:
        raise CommandError(f'part detector: {reasons[0]}, which is not exported; the backbone can be (part backbone).')


def is_detector(model: Mapping[str, Any]) -> bool:
    """Say whether a model's config is one of a kind that :class:`Detector` takes."""
    # mmdet's scope may be before the name.
    return str(model.get('type')).rpartition('.')[2] in ('FasterRCNN', 'MaskRCNN', 'RetinaNet')


def _unsupported(model: Any) -> Any:
    if hasattr(model, 'roi_head'):
        dense, head = getattr(model, 'rpn_head', None), model.roi_head
        if type(head).__name__ != 'StandardRoIHead' or head.with_shared_head:
            yield f'its RoI head is a {type(head).__name__}'
            return
        yield from _unsupported_coder(head.bbox_head)
        if head.bbox_head.custom_cls_channels or not head.bbox_head.with_reg or not head.bbox_head.with_cls:
            yield f'its box head is a {type(head.bbox_head).__name__} with other outputs than scores and boxes'
        yield from _unsupported_selection(head.test_cfg)
        for extractor in (head.bbox_roi_extractor, getattr(head, 'mask_roi_extractor', None)):
            if extractor is None:
                continue
            layer = extractor.roi_layers[0]
            if type(extractor).__name__ != 'SingleRoIExtractor' or type(layer).__name__ != 'RoIAlign':
                yield f'its regions are cut by {type(extractor).__name__} with {type(layer).__name__}'
            elif layer.pool_mode != 'avg':
                yield f'its RoIAlign takes the {layer.pool_mode} of the samples'
    else:
        dense = getattr(model, 'bbox_head', None)
    if not hasattr(dense, 'prior_generator') or not hasattr(dense, 'bbox_coder'):
        yield f'the model is a {type(model).__name__} without anchors'
        return
    assert dense is not None
    if type(dense.prior_generator).__name__ != 'AnchorGenerator' or not dense.use_sigmoid_cls:
        yield f'its {type(dense).__name__} has a {type(dense.prior_generator).__name__} or scores by softmax'
    if (dense.test_cfg or {}).get('nms_pre', -1) < 1:
        yield 'its test_cfg sets no nms_pre'
    if type(dense).__name__ not in ('RPNHead', 'RetinaHead', 'AnchorHead', 'RetinaSepBNHead'):
        yield f'its dense head is a {type(dense).__name__}'
    yield from _unsupported_coder(dense)
    yield from _unsupported_selection(dense.test_cfg)


def _unsupported_coder(head: Any) -> Any:
    coder = head.bbox_coder
    if type(coder).__name__ != 'DeltaXYWHBBoxCoder' or coder.add_ctr_clamp:
        yield f'its boxes are coded by {type(coder).__name__}'


def _unsupported_selection(cfg: Any) -> Any:
    cfg = cfg or {}
    nms = dict(cfg.get('nms') or {})
    other = set(nms) - {'type', 'iou_threshold', 'class_agnostic', 'split_thr'}
    if nms.get('type', 'nms') != 'nms' or other or 'iou_threshold' not in nms:
        yield f'its boxes are selected by nms={nms}'
    if cfg.get('max_per_img', -1) < 1:
        yield 'its test_cfg sets no max_per_img'


Found = tuple[Tensor, Tensor, Tensor]


def _dense_boxes(head: Any, maps: Sequence[Tensor], size: Sequence[int], proposals: bool = False) -> Found:
    """Select the boxes of a dense head: boxes (B, n, 4), scores (B, n) and classes (B, n), or levels of proposals."""
    cfg = head.test_cfg
    score_maps, delta_maps = head(maps)[:2]
    anchors = head.prior_generator.grid_priors([each.shape[2:] for each in score_maps], device=maps[0].device)
    classes, limit = head.cls_out_channels, cfg['nms_pre']
    levels: list[Found] = []
    for level, (logits, deltas, own) in enumerate(zip(score_maps, delta_maps, anchors, strict=True)):
        scores = logits.permute(0, 2, 3, 1).flatten(1).sigmoid()
        if not proposals:
            scores = _dropped(scores, scores > cfg.get('score_thr', 0))
        # Maps of small images have fewer anchors than are selected.
        scores, places = F.pad(scores, (0, limit), value=-1.0).topk(limit, dim=1)
        labels = places % classes
        places = torch.div(places, classes, rounding_mode='floor').clamp(max=own.shape[0] - 1)
        deltas = deltas.permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, 4))
        boxes = _decoded(own[places], _taken(deltas, places), head.bbox_coder, size)
        # Objects of one class suppress each other, and proposals of one level.
        levels.append((boxes, scores, torch.full_like(labels, level) if proposals else labels))
    boxes, scores, groups = (torch.cat(each, 1) for each in zip(*levels, strict=True))
    smallest = cfg.get('min_bbox_size', -1)
    if smallest >= 0:
        sides = boxes[..., 2:] - boxes[..., :2]
        scores = _dropped(scores, (sides > smallest).all(2))
    return _selected(boxes, scores, groups, cfg)


def _regions(head: Any, maps: Sequence[Tensor], proposals: Tensor, scores: Tensor, size: Sequence[int]) -> Found:
    """Classify and refine proposals (B, n, 4), of which those with a score of 0 or less are none, and select."""
    box_head, cfg = head.bbox_head, head.test_cfg
    count, classes = proposals.shape[1], box_head.num_classes
    features = _pooled(head.bbox_roi_extractor, maps, _numbered(proposals))
    logits, deltas = box_head(features)
    found = logits.softmax(1)[:, :-1].unflatten(0, (-1, count))
    found = _dropped(found, ((found > cfg['score_thr']) & (scores > 0).unsqueeze(2))).flatten(1)
    deltas = deltas.unflatten(0, (-1, count)).unflatten(2, (-1, 4)).expand(-1, -1, classes, -1).flatten(1, 2)
    repeated = proposals.unsqueeze(2).expand(-1, -1, classes, -1).flatten(1, 2)
    labels = torch.arange(classes, device=proposals.device).repeat(count).expand_as(found)
    return _selected(_decoded(repeated, deltas, box_head.bbox_coder, size), found, labels, cfg)


def _masks(head: Any, maps: Sequence[Tensor], boxes: Tensor, labels: Tensor) -> Tensor:
    """Compute the masks of boxes (B, n, 4): probabilities (B, n, h, w)."""
    logits = head.mask_head(_pooled(head.mask_roi_extractor, maps, _numbered(boxes)))
    channels = torch.zeros_like(labels) if head.mask_head.class_agnostic else labels.clamp(min=0)
    places = channels.reshape(-1, 1, 1, 1).expand(-1, 1, *logits.shape[2:])
    return logits.gather(1, places).squeeze(1).sigmoid().unflatten(0, (-1, boxes.shape[1]))


def _selected(boxes: Tensor, scores: Tensor, groups: Tensor, cfg: Mapping[str, Any]) -> Found:
    """Suppress boxes that overlap with a better one of their group, and take the best ``max_per_img``."""
    nms, count = cfg['nms'], cfg['max_per_img']
    apart = boxes
    if not nms.get('class_agnostic', False):
        # As mmcv does, groups are moved so far apart that they do not overlap, which rounds the boxes likewise.
        furthest = torch.where((scores > 0).unsqueeze(2), boxes, 0.0).amax((1, 2))
        apart = boxes + (groups * (furthest + 1.0).unsqueeze(1)).unsqueeze(2)
    marks = kept_boxes(apart, scores, nms['iou_threshold'], count)
    scores, places = F.pad(_dropped(scores, marks > 0), (0, count), value=-1.0).topk(count, dim=1)
    places = places.clamp(max=boxes.shape[1] - 1)
    return _taken(boxes, places), scores, groups.gather(1, places)


def _finished(boxes: Tensor, scores: Tensor, labels: Tensor) -> Found:
    real = scores > 0
    return torch.where(real.unsqueeze(2), boxes, 0.0), torch.where(real, scores, 0.0), torch.where(real, labels, -1)


def _decoded(anchors: Tensor, deltas: Tensor, coder: Any, size: Sequence[int]) -> Tensor:
    """Move anchors by what a head predicts, as ``DeltaXYWHBBoxCoder`` codes it; all are (B, n, 4)."""
    deltas = deltas * deltas.new_tensor(coder.stds) + deltas.new_tensor(coder.means)
    moves, scales = deltas.split(2, 2)
    centre, sides = (anchors[..., :2] + anchors[..., 2:]) * 0.5, anchors[..., 2:] - anchors[..., :2]
    largest = abs(math.log(16 / 1000))
    centre, sides = centre + sides * moves, sides * scales.clamp(-largest, largest).exp()
    boxes = torch.cat([centre - 0.5 * sides, centre + 0.5 * sides], 2)
    if coder.clip_border:
        height, width = (torch.scalar_tensor(side) for side in size)
        boxes = torch.minimum(boxes.clamp(min=0), torch.stack([width, height, width, height]))
    return boxes


def _pooled(extractor: Any, maps: Sequence[Tensor], rois: Tensor) -> Tensor:
    """Cut each region (R, 5) out of the map that its size chooses: (R, C, h, w)."""
    levels = extractor.map_roi_levels(rois, extractor.num_inputs)
    pooled: Tensor | None = None
    for level in range(extractor.num_inputs):
        layer = extractor.roi_layers[level]
        own = (levels == level).unsqueeze(1)
        # Regions of other levels are made empty, and take no time.
        cells = roi_align(
            maps[level],
            torch.cat([rois[:, :1], torch.where(own, rois[:, 1:], 0.0)], 1),
            *layer.output_size,
            layer.spatial_scale,
            layer.sampling_ratio,
            layer.aligned,
        )
        pooled = cells if pooled is None else torch.where(own[..., None, None], cells, pooled)
    assert pooled is not None
    return pooled


def _numbered(boxes: Tensor) -> Tensor:
    """Put the image's number before each box: (B, n, 4) becomes (B * n, 5)."""
    numbers = torch.arange(boxes.shape[0], device=boxes.device, dtype=boxes.dtype)
    return torch.cat([numbers[:, None, None].expand(-1, boxes.shape[1], 1), boxes], 2).flatten(0, 1)


def _dropped(scores: Tensor, kept: Tensor) -> Tensor:
    return torch.where(kept, scores, -1.0)


def _taken(rows: Tensor, places: Tensor) -> Tensor:
    """Take rows (B, N, 4) by their places (B, n)."""
    return rows.gather(1, places.unsqueeze(2).expand(-1, -1, 4))
