"""What there is to be demonstrated: a table by family and task."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mmengine.config import Config

from ssm_backbones.demo.images import show_classes, show_detections, show_label_maps
from ssm_backbones.shapes.options import ShapesOptions


@dataclass(frozen=True)
class Task:
    """What the families' demos of one task have in common.

    Attributes:
        summary: what is learnt, in a few words.
        data_format: which of the generated formats is read.
        options: what is generated.
        figures: the figures to report: shown name by logged name.
        scale: factor that makes fractions of the logged figures.
        samples: glob pattern, below the data's folder, of the few held-out images whose feature maps are shown.
        dump: name of what ``tools/test.py --out`` writes: a file, or a folder of label maps.
        show: draws held-out images with truth and prediction: ``show(cfg, dump, heading, path)``.
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
    """One row of the table: a task, and the config file below the checkout's root that learns it."""

    task: Task
    config: str


TASKS: dict[str, Task] = {
    'det': Task(
        summary='detection with instance masks',
        data_format='coco',
        options=ShapesOptions(train=1600, val=200),
        figures={'coco/bbox_mAP': 'box AP', 'coco/segm_mAP': 'mask AP'},
        scale=1.0,
        samples='val2017/*000[1-4].jpg',
        dump='predictions.pkl',
        show=show_detections,
    ),
    'seg': Task(
        summary='semantic segmentation',
        data_format='ade20k',
        options=ShapesOptions(train=2400, val=200, size=(96, 96)),
        figures={'mIoU': 'mIoU', 'mAcc': 'mean class accuracy', 'aAcc': 'pixel accuracy'},
        scale=0.01,
        samples='images/validation/*_0000000[1-4].jpg',
        dump='predictions',
        show=show_label_maps,
    ),
    'cls': Task(
        summary='classification',
        data_format='imagenet',
        options=ShapesOptions(train=2400, val=300, size=(96, 96)),
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
            'seg': 'v2m-nano_upernet',
            'cls': 'v2m-nano',
        },
        'mamba2d': {
            'det': 'mask-rcnn_mamba2d-atto_fpn',
            'seg': 'mamba2d-atto_upernet',
            'cls': 'mamba2d-atto',
        },
    }.items()
    for task, name in names.items()
}
"""The demos there are, by (family, task)."""
