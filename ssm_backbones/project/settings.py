"""The settings of a config for one's own data, and the file's text."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ssm_backbones.project.bands import Bands
from ssm_backbones.project.recipe import Base
from ssm_backbones.project.sources import Found
from ssm_backbones.utils.configs import PACKAGE

_WIDTH = 110


class Code(str):
    """Python that stands in a config as it is."""


@dataclass(frozen=True)
class Plan:
    """What a config is made of.

    Attributes:
        task: ``'det'``, ``'seg'`` or ``'cls'``.
        found: The data.
        base: The config to inherit from.
        bands: The bands of images that the usual loader does not read, or None.
        weights: Checkpoint that the backbone starts from, or None.
        batch_size: Images of a step on one device.
        epochs: Number of epochs.
    """

    task: str
    found: Found
    base: Base
    bands: Bands | None
    weights: str | None
    batch_size: int
    epochs: int

    @property
    def iterations(self) -> int:
        """Number of steps on one device."""
        steps = max(self.found.images // self.batch_size, 1) * self.epochs
        return min(steps, 160_000) if self.task == 'seg' else steps


def config_text(plan: Plan) -> str:
    """Return the text of the config."""
    found = plan.found
    settings: dict[str, Any] = dict(_base_=f'{PACKAGE}::{plan.base.name}', classes=found.classes)
    metainfo = dict(classes=Code('classes'))
    if found.palette:
        settings['palette'] = [list(colour) for colour in found.palette]
        metainfo['palette'] = Code('palette')
    settings['metainfo'] = metainfo
    settings['batch_size'] = plan.batch_size
    settings |= {'det': _detection, 'seg': _segmentation, 'cls': _classification}[plan.task](plan)
    settings['auto_scale_lr'] = dict(enable=True)
    head = (
        f'# {found.kind}: {found.images} training and {found.val_images} validation images.\n'
        '# Batch, epochs and warm-up follow rules of thumb. The learning rate is scaled from the batch that it was\n'
        '# chosen for to the actual one (auto_scale_lr).\n'
    )
    return head + ''.join(f'{name} = {_code(value, len(name) + 3)}\n' for name, value in settings.items())


def _detection(plan: Plan) -> dict[str, Any]:
    found, base, bands, epochs = plan.found, plan.base, plan.bands, plan.epochs
    count = len(found.classes)
    roi_head: dict[str, Any] = dict(bbox_head=dict(num_classes=count))
    model = _model(plan)
    if found.masks:
        roi_head['mask_head'] = dict(num_classes=count)
    elif base.without_masks:
        model = dict(type='FasterRCNN') | model
        roi_head.update(mask_roi_extractor=None, mask_head=None)
    model['roi_head'] = roi_head
    if base.channels is not None:
        model['neck'] = dict(in_channels=list(base.channels))
    if bands is not None:
        model['data_preprocessor'] = dict(mean=None, std=None, bgr_to_rgb=False)
    pipelines = _pipelines(plan)
    if base.without_masks:
        first = '_base_.train_pipeline' if bands is None else '[load, *_base_.train_pipeline[1:]]'
        pipelines['train_pipeline'] = _each(first, 'with_mask=False')
    settings = dict(model=model, **pipelines)
    settings |= _loaders(plan, dict(data_root='', metainfo=Code('metainfo')), pipelines)
    settings['val_evaluator'] = dict(ann_file=found.val['ann_file'], metric=['bbox', 'segm'] if found.masks else 'bbox')
    settings['test_evaluator'] = Code('val_evaluator')
    milestones = sorted({max(round(epochs * part), 1) for part in (2 / 3, 11 / 12)})
    settings['train_cfg'] = dict(max_epochs=epochs, val_interval=max(epochs // 12, 1))
    settings['param_scheduler'] = [
        dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=_warm_up(plan, 1000)),
        dict(type='MultiStepLR', begin=0, end=epochs, by_epoch=True, milestones=milestones, gamma=0.1),
    ]
    settings['default_hooks'] = dict(checkpoint=dict(max_keep_ckpts=3, save_best='coco/bbox_mAP'))
    return settings


def _segmentation(plan: Plan) -> dict[str, Any]:
    found, base, bands = plan.found, plan.base, plan.bands
    model = _model(plan)
    decode_head: dict[str, Any] = dict(num_classes=len(found.classes))
    auxiliary_head = dict(decode_head)
    if base.channels is not None:
        decode_head['in_channels'] = list(base.channels)
        auxiliary_head['in_channels'] = base.channels[2]
    model.update(decode_head=decode_head, auxiliary_head=auxiliary_head)
    if bands is not None:
        model['data_preprocessor'] = dict(mean=None, std=None, bgr_to_rgb=False)
    pipelines = _pipelines(plan)
    # The photometric distortion is for three channels of 8 bits. Index 0 is a class here; ADE20K's is none.
    kept = {
        name: f'_base_.{name}'
        if bands is None
        else f"[load, *[step for step in _base_.{name}[1:] if step['type'] != 'PhotoMetricDistortion']]"
        for name in ('train_pipeline', 'test_pipeline')
    }
    pipelines |= {name: _each(steps, 'reduce_zero_label=False') for name, steps in kept.items()}
    if bands is not None:
        pipelines['tta_pipeline'] = Code('[load, *_base_.tta_pipeline[1:]]')
    fixed = dict(_delete_=True, type='BaseSegDataset', metainfo=Code('metainfo'), reduce_zero_label=False)
    settings = dict(model=model, **pipelines, **_loaders(plan, fixed, pipelines))
    interval = max(plan.iterations // 10, 1)
    warm_up = _warm_up(plan, 1500)
    settings['train_cfg'] = dict(max_iters=plan.iterations, val_interval=interval)
    settings['param_scheduler'] = [
        dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=warm_up),
        dict(type='PolyLR', eta_min=0.0, power=1.0, begin=warm_up, end=plan.iterations, by_epoch=False),
    ]
    settings['default_hooks'] = dict(checkpoint=dict(interval=interval, max_keep_ckpts=3, save_best='mIoU'))
    return settings


def _classification(plan: Plan) -> dict[str, Any]:
    found, base, bands, epochs = plan.found, plan.base, plan.bands, plan.epochs
    count = len(found.classes)
    topk = (1, 5) if count > 5 else (1,)
    head: dict[str, Any] = dict(num_classes=count, topk=topk)
    if base.channels is not None:
        head['in_channels'] = base.channels[-1]
    preprocessor: dict[str, Any] = dict(num_classes=count)
    pipelines = _pipelines(plan)
    if bands is not None:
        preprocessor.update(mean=None, std=None, to_rgb=False)
        # The base's augmentation is for three channels of 8 bits.
        pack = dict(type='PackInputs')
        pipelines['train_pipeline'] = [
            Code('load'),
            dict(type='RandomResizedCrop', scale=224),
            dict(type='RandomFlip', prob=0.5),
            pack,
        ]
        pipelines['test_pipeline'] = [
            Code('load'),
            dict(type='ResizeEdge', scale=256, edge='short'),
            dict(type='CenterCrop', crop_size=224),
            pack,
        ]
    else:
        pipelines = {name: Code(f'_base_.{name}') for name in ('train_pipeline', 'test_pipeline')}
    fixed = dict(_delete_=True, type='CustomDataset', metainfo=Code('metainfo'))
    settings = dict(model=_model(plan) | dict(head=head), data_preprocessor=preprocessor, **pipelines)
    settings |= _loaders(plan, fixed, pipelines)
    settings['val_evaluator'] = dict(topk=topk)
    settings['test_evaluator'] = Code('val_evaluator')
    warm_up = min(max(epochs // 15, 1), 20)
    settings['train_cfg'] = dict(max_epochs=epochs, val_interval=max(epochs // 30, 1))
    settings['param_scheduler'] = [
        dict(type='LinearLR', start_factor=1e-3, by_epoch=True, begin=0, end=warm_up, convert_to_iter_based=True),
        dict(
            type='CosineAnnealingLR',
            eta_min=1e-6,
            by_epoch=True,
            begin=warm_up,
            end=max(epochs, warm_up + 1),
            convert_to_iter_based=True,
        ),
    ]
    # In so many steps averages forget the head that the training began with; fewer than a few hundred are too short.
    average = dict(type='EMAHook', momentum=float(f'{12 / plan.iterations:.2g}'), priority='ABOVE_NORMAL')
    settings['custom_hooks'] = [average] if plan.iterations >= 500 else []
    settings['default_hooks'] = dict(checkpoint=dict(max_keep_ckpts=3, save_best='auto'))
    return settings


def _model(plan: Plan) -> dict[str, Any]:
    backbone = dict(plan.base.backbone)
    bands = plan.bands.count if plan.bands is not None else 3
    if bands != 3:
        backbone['in_channels'] = bands
    if plan.weights is None:
        backbone['init_cfg'] = None
    else:
        backbone['init_cfg'] = dict(type='OfficialPretrained', checkpoint=plan.weights)
        if bands != 3:
            backbone['init_cfg']['in_channels'] = bands
    return dict(backbone=backbone)


def _pipelines(plan: Plan) -> dict[str, Any]:
    """Return the pipelines of images that the usual loader does not read; none for others."""
    if plan.bands is None:
        return {}
    return dict(
        load=dict(type='LoadBands', bands=plan.bands.count, mean=list(plan.bands.mean), std=list(plan.bands.std)),
        train_pipeline=Code('[load, *_base_.train_pipeline[1:]]'),
        test_pipeline=Code('[load, *_base_.test_pipeline[1:]]'),
    )


def _each(steps: str, change: str) -> Code:
    """Return code for steps of which LoadAnnotations is changed."""
    return Code(
        f"[\n    dict(step, {change}) if step['type'] == 'LoadAnnotations' else step\n    for step in {steps}\n]"
    )


def _loaders(plan: Plan, fixed: dict[str, Any], pipelines: dict[str, Any]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for name, data, pipeline in (
        ('train', plan.found.train, 'train_pipeline'),
        ('val', plan.found.val, 'test_pipeline'),
    ):
        dataset = {**fixed, **data}
        if pipeline in pipelines:
            dataset['pipeline'] = Code(pipeline)
        loader = dict(num_workers=min(4, os.cpu_count() or 1), dataset=dataset)
        made[f'{name}_dataloader'] = dict(batch_size=Code('batch_size'), **loader) if name == 'train' else loader
    made['test_dataloader'] = Code('val_dataloader')
    return made


def _warm_up(plan: Plan, usual: int) -> int:
    return min(usual, max(plan.iterations // 20, 1))


def _code(value: Any, column: int, indent: int = 0) -> str:
    """Write a value as a config does: keyword arguments, one a line where they do not fit."""
    if isinstance(value, Code):
        return value.replace('\n', '\n' + ' ' * indent)
    if isinstance(value, Mapping):
        parts = [(f'{key}=', inner) for key, inner in value.items()]
        start, end = 'dict(', ')'
    elif isinstance(value, (list, tuple)):
        parts = [('', inner) for inner in value]
        start, end = ('[', ']') if isinstance(value, list) else ('(', ',)' if len(value) == 1 else ')')
    else:
        return repr(value)
    flat = start + ', '.join(f'{key}{_code(inner, 0)}' for key, inner in parts) + end
    if column + len(flat) <= _WIDTH and '\n' not in flat:
        return flat
    inside = indent + 4
    if not any(isinstance(inner, (Mapping, list, tuple)) for _, inner in parts) and not isinstance(value, Mapping):
        return _filled(start, [_code(inner, 0) for _, inner in parts], end, inside)
    lines = [f'{" " * inside}{key}{_code(inner, inside + len(key), inside)},\n' for key, inner in parts]
    return f'{start}\n{"".join(lines)}{" " * indent}{end[-1]}'


def _filled(start: str, words: list[str], end: str, indent: int) -> str:
    """Put many short values on as few lines as they take."""
    lines, line = [], ''
    for word in words:
        if line and indent + len(line) + len(word) > _WIDTH:
            lines.append(line.rstrip())
            line = ''
        line += f'{word}, '
    lines.append(line.rstrip().removesuffix(','))
    inner = '\n'.join(' ' * indent + each for each in lines)
    return f'{start}\n{inner}{end}'
