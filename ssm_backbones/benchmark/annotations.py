"""Synthetic batches for the host libraries' models: noise with the required metadata and annotations."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.structures import InstanceData, PixelData
from torch import Tensor, nn

# Objects of an image, about as many as COCO's images have.
OBJECTS = 8
# Candidates for each detection that the config allows, before overlapping ones are dropped.
_CANDIDATES = 5


def synthetic_batch(
    cfg: Config, model: nn.Module, batch_size: int, height: int, width: int, device: torch.device
) -> dict[str, Any]:
    """Build a batch as a data loader would: ``inputs``, uint8 (C, H, W) each, and ``data_samples``.

    Args:
        cfg: The config, for its library and the number of classes.
        model: Its model, for the number of channels.
        batch_size: Images.
        height: Height of the images.
        width: Width of the images.
        device: Device of the images.
    """
    generator = torch.Generator().manual_seed(0)
    channels = getattr(getattr(model, 'backbone', None), 'in_channels', 3)
    channels = channels if isinstance(channels, int) else 3
    # Every head must know the label, so the one with the fewest classes decides.
    classes = min(_numbers_of_classes(cfg.model), default=1)
    images = [
        torch.randint(256, (channels, height, width), dtype=torch.uint8, generator=generator).to(device)
        for _ in range(batch_size)
    ]
    sample = {'mmpretrain': _classified, 'mmdet': _detected, 'mmseg': _segmented}[cfg.default_scope]
    size = (height, width)
    meta = dict(
        img_path='',
        img_shape=size,
        ori_shape=size,
        pad_shape=size,
        batch_input_shape=size,
        scale_factor=(1.0, 1.0),
        flip=False,
    )
    return dict(inputs=images, data_samples=[sample(meta, classes, generator) for _ in range(batch_size)])


def let_detections_through(model: nn.Module, predict: Callable[[], Any]) -> float | None:
    """Lower a two-stage detector's score threshold so that it detects about as much as its config allows.

    An untrained detector finds nothing in noise, so that what it does to its detections, such as masks, would not be
    measured. One prediction is made to see the scores.

    Returns:
        Detections for each image, or None where the model has no such second stage.
    """
    head = getattr(getattr(model, 'roi_head', None), 'bbox_head', None)
    settings = getattr(getattr(model, 'roi_head', None), 'test_cfg', None)
    last = head[-1] if isinstance(head, nn.ModuleList) else head
    if last is None or settings is None or 'score_thr' not in settings:
        return None
    scores: list[Tensor] = []
    hook = last.register_forward_hook(lambda module, inputs, outputs: scores.append(outputs[0]))
    try:
        images = len(predict())
    finally:
        hook.remove()
    if not getattr(last.loss_cls, 'use_sigmoid', False):
        of_objects = torch.cat(scores).float().softmax(-1)[:, :-1].flatten()
        count = min(_CANDIDATES * settings.max_per_img * images, of_objects.numel())
        if count:
            settings.score_thr = of_objects.topk(count).values[-1].item()
    return sum(len(each.pred_instances) for each in predict()) / images


def _numbers_of_classes(settings: Any) -> Iterator[int]:
    if isinstance(settings, Mapping):
        for key, value in settings.items():
            if key == 'num_classes' and isinstance(value, int):
                yield value
            else:
                yield from _numbers_of_classes(value)
    elif isinstance(settings, (list, tuple)):
        for value in settings:
            yield from _numbers_of_classes(value)


def _classified(meta: Mapping[str, Any], classes: int, generator: torch.Generator) -> Any:
    sample = importlib.import_module('mmpretrain.structures').DataSample(metainfo=dict(meta))
    return sample.set_gt_label(int(torch.randint(classes, (), generator=generator)))


def _segmented(meta: Mapping[str, Any], classes: int, generator: torch.Generator) -> Any:
    sample = importlib.import_module('mmseg.structures').SegDataSample(metainfo=dict(meta, padding_size=[0] * 4))
    sample.gt_sem_seg = PixelData(data=torch.randint(classes, (1, *meta['img_shape']), generator=generator))
    return sample


def _detected(meta: Mapping[str, Any], classes: int, generator: torch.Generator) -> Any:
    sample = importlib.import_module('mmdet.structures').DetDataSample(metainfo=dict(meta))
    height, width = meta['img_shape']
    low, extent = torch.rand(2, OBJECTS, 2, generator=generator)
    scale = torch.tensor([width, height])
    # A quarter to half of the image each way.
    first = 0.5 * low * scale
    boxes = torch.cat([first, first + (0.25 + 0.25 * extent) * scale], dim=1)
    masks = np.zeros((OBJECTS, height, width), dtype=np.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.long().tolist(), strict=True):
        mask[top : bottom + 1, left : right + 1] = 1
    sample.gt_instances = InstanceData(
        bboxes=boxes,
        labels=torch.randint(classes, (OBJECTS,), generator=generator),
        masks=importlib.import_module('mmdet.structures.mask').BitmapMasks(masks, height, width),
    )
    sample.ignored_instances = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))
    return sample
