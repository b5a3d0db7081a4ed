"""Table of the demos by family and task."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mmengine.config import Config

from ssm_backbones.demo.images import show_classes, show_detections, show_label_maps
from ssm_backbones.shapes.options import ShapesOptions


@dataclass(frozen=True)
class Task:
    """Settings that the demos of one task share.

    Attributes:
        summary: Short description of the task.
        data_format: Name of the generated format to read.
        options: Options of the generated data.
        figures: The figures to report: shown name by logged name.
        scale: Factor that converts the logged figures to fractions.
        samples: Glob pattern, below the data's folder, of the few held-out images whose feature maps are shown.
        dump: Name of the output of ``tools/test.py --out``: a file, or a folder of label maps.
        show: Function that draws held-out images with truth and prediction: ``show(cfg, dump, heading, path)``.
    """

    summary: str
    data_format: str
    options: ShapesOptions
    figures: Mapping[str, str]
    scale: float
    samples: str
    dump: str
    show: Callable[[Config, Path, str, Path], None]


@dataclass(frozen=True)
class Demo:
    """A task and the path of its config file, relative to the checkout's root."""

    task: Task
    config: str


TASKS: dict[str, Task] = {
    'det': Task(
        summary='detection with instance masks',
        data_format='coco',
        options=ShapesOptions(train=1800, val=200),
        figures={'coco/bbox_mAP': 'box AP', 'coco/segm_mAP': 'mask AP'},
        scale=1.0,
        samples='val2017/*000[1-4].jpg',
        dump='predictions.pkl',
        show=show_detections,
    ),
    'seg': Task(
        summary='semantic segmentation',
        data_format='ade20k',
        options=ShapesOptions(train=4800, val=200, size=(96, 96)),
        figures={'mIoU': 'mIoU', 'mAcc': 'mean class accuracy', 'aAcc': 'pixel accuracy'},
        scale=0.01,
        samples='images/validation/*_0000000[1-4].jpg',
        dump='predictions',
        show=show_label_maps,
    ),
    'cls': Task(
        summary='classification',
        data_format='imagenet',
        options=ShapesOptions(train=9600, val=300, size=(96, 96)),
        figures={'accuracy/top1': 'accuracy'},
        scale=0.01,
        samples='val/*/*_0000000[1-4].JPEG',
        dump='predictions.pkl',
        show=show_classes,
    ),
}
"""The tasks by the names that the command line takes."""

DEMOS: dict[tuple[str, str], Demo] = {
    (family, task): Demo(TASKS[task], f'configs/{family}/{name}_demo_shapes.py')
    for family, names in {
        'vmamba': {
            'det': 'mask-rcnn_vmamba-nano_fpn',
            'seg': 'vmamba-nano_upernet',
            'cls': 'vmamba-nano',
        },
        'v2m': {
            'det': 'mask-rcnn_v2m-hier-nano_fpn',
            'seg': 'v2m-hier-nano_upernet',
            'cls': 'v2m-hier-nano',
        },
        'mamba2d': {
            'det': 'mask-rcnn_mamba2d-atto_fpn',
            'seg': 'mamba2d-atto_upernet',
            'cls': 'mamba2d-atto',
        },
    }.items()
    for task, name in names.items()
}
"""All demos, by (family, task)."""
