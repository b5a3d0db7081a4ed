"""Draw predictions with the host libraries' own visualizers."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import VISUALIZERS, DefaultScope

from ssm_backbones.compat import draw_in_every_process
from ssm_backbones.visualization.reading import array_as_rgb

MAX_SIDE = 2048


def picture(image: np.ndarray) -> np.ndarray:
    """Convert a loaded image to uint8 RGB (H, W, 3) for drawing, of at most :data:`MAX_SIDE` pixels a side."""
    import cv2

    height, width = image.shape[:2]
    factor = min(1.0, MAX_SIDE / max(height, width))
    if factor < 1:
        size = (max(round(width * factor), 1), max(round(height * factor), 1))
        # More channels than four are no picture for OpenCV; the first three are drawn.
        image = cv2.resize(image if image.ndim < 3 else image[:, :, :4], size, interpolation=cv2.INTER_AREA)
    return array_as_rgb(image)


class Drawer:
    """Draw an image's prediction, by the visualizer of the config's library.

    Larger images are drawn at :data:`MAX_SIDE` pixels a side: the visualizers take about a hundred bytes a pixel.

    Args:
        cfg: The config, for its visualizer's settings.
        classes: Names of the classes.
        palette: RGB colours of the classes.
        score_thr: Least score of objects that are drawn.
    """

    def __init__(self, cfg: Config, classes: Sequence[str], palette: Sequence[Sequence[int]], score_thr: float) -> None:
        self.scope, self.score_thr = cfg.default_scope, score_thr
        self.classes, self.palette = tuple(classes), [tuple(colour) for colour in palette]
        settings = dict(cfg.get('visualizer') or dict(type=_VISUALIZERS[self.scope]))
        # Visualizers are kept by their names for the whole process.
        settings.update(name=f'predict_{uuid.uuid4().hex}', vis_backends=None)
        settings.pop('save_dir', None)
        with DefaultScope.overwrite_default_scope(self.scope):
            self.visualizer = VISUALIZERS.build(settings)
        draw_in_every_process(self.visualizer)
        self.visualizer.dataset_meta = dict(classes=self.classes, palette=self.palette)

    def __call__(self, shown: np.ndarray, sample: Any) -> np.ndarray:
        """Draw a data sample on the picture of its image, and return uint8 RGB of the picture's size."""
        with DefaultScope.overwrite_default_scope(self.scope), _same_random_numbers():
            if self.scope == 'mmpretrain':
                self.visualizer.visualize_cls(shown, sample, classes=self.classes, draw_gt=False)
                return self.visualizer.get_image()
            size = shown.shape[:2]
            if self.scope == 'mmdet':
                # An object below the threshold is not scaled in vain.
                sample = _scaled_objects(sample, size, self.score_thr)
                options = dict(pred_score_thr=self.score_thr)
            else:
                sample, options = _scaled_labels(sample, size), {}
            self.visualizer.add_datasample('', shown, sample, draw_gt=False, draw_pred=True, **options)
            return self.visualizer.get_image()


@contextlib.contextmanager
def _same_random_numbers() -> Iterator[None]:
    """Let each image draw the same numbers: mmdet varies the colour of each mask by NumPy's."""
    before = np.random.get_state()
    np.random.seed(0)
    try:
        yield
    finally:
        np.random.set_state(before)


_VISUALIZERS = {'mmdet': 'DetLocalVisualizer', 'mmseg': 'SegLocalVisualizer', 'mmpretrain': 'UniversalVisualizer'}


def _scaled_objects(sample: Any, size: tuple[int, int], score_thr: float) -> Any:
    from mmdet.structures import DetDataSample

    found = sample.pred_instances
    found = found[found.scores > score_thr]
    height, width = sample.ori_shape[:2]
    factors = found.bboxes.new_tensor([size[1] / width, size[0] / height] * 2)
    shown = type(found)(bboxes=found.bboxes * factors, labels=found.labels, scores=found.scores)
    if 'masks' in found and len(found):
        shown.masks = np.stack([_scaled_mask(mask, size) for mask in found.masks])
    drawn = DetDataSample(metainfo=dict(ori_shape=size))
    drawn.pred_instances = shown
    return drawn


def _scaled_mask(mask: Any, size: tuple[int, int]) -> np.ndarray:
    import cv2
    from pycocotools import mask as coco

    pixels = coco.decode(mask) if isinstance(mask, dict) else mask.numpy().astype(np.uint8)
    if pixels.shape != size:
        pixels = cv2.resize(pixels, size[::-1], interpolation=cv2.INTER_NEAREST)
    return pixels.astype(bool)


def _scaled_labels(sample: Any, size: tuple[int, int]) -> Any:
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    labels = sample.pred_sem_seg.data
    if tuple(labels.shape[1:]) != tuple(size):
        rows = torch.arange(size[0]) * labels.shape[1] // size[0]
        columns = torch.arange(size[1]) * labels.shape[2] // size[1]
        labels = labels[:, rows][:, :, columns]
    drawn = SegDataSample(metainfo=dict(ori_shape=size))
    drawn.pred_sem_seg = PixelData(data=labels.long())
    return drawn
