"""Fixtures: tiny data, tiny configs of the three host libraries, and their runs.

Every test folder may use them; the host libraries are imported by who does, so that the ops' tests need none of them.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

# What all tiny configs share: deterministic, quick, and every iteration logged.
COMMON = """
    custom_imports = dict(imports=['ssm_backbones'], allow_failed_imports=False)
    default_hooks = dict(logger=dict(interval=1), checkpoint=dict(max_keep_ckpts=2))
    randomness = dict(seed=0)
    optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=4e-3))
    auto_scale_lr = dict(enable=False, base_batch_size=8)
    train_dataloader = dict(batch_size=4, num_workers=0, persistent_workers=False)
    val_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False)
    test_dataloader = val_dataloader
"""

MMDET = """
    _base_ = [
        '{root}/configs/_base_/models/mask-rcnn_vmamba_fpn.py',
        '{root}/configs/_base_/datasets/shapes_instance.py',
        '{root}/configs/_base_/schedules/adamw_1x.py',
        '{root}/configs/_base_/mmdet_runtime.py',
    ]
    model = dict(
        backbone=dict(arch='test', drop_path_rate=0.0),
        neck=dict(in_channels=[16, 32, 64, 128], out_channels=32, num_outs=4),
        # No more candidates than are sampled, so that nothing is drawn at random.
        train_cfg=dict(
            rpn=dict(sampler=dict(num=10000)), rpn_proposal=dict(nms_pre=40, max_per_img=20),
            rcnn=dict(sampler=dict(num=1000))),
        test_cfg=dict(rpn=dict(nms_pre=40, max_per_img=20), rcnn=dict(max_per_img=10, score_thr=0.0)),
        rpn_head=dict(
            in_channels=32, feat_channels=32, anchor_generator=dict(scales=[4], strides=[4, 8, 16, 32])),
        roi_head=dict(
            bbox_roi_extractor=dict(out_channels=32),
            bbox_head=dict(in_channels=32, fc_out_channels=64, num_classes=6),
            mask_roi_extractor=dict(out_channels=32),
            mask_head=dict(num_convs=1, in_channels=32, conv_out_channels=32, num_classes=6)))
    data_root = '{data}/coco/'
    flip = dict(type='RandomFlip', prob=0.0)
    pipeline = [
        dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
        dict(type='Resize', scale=(64, 64)), dict(type='PackDetInputs')]
    train_dataloader = dict(dataset=dict(data_root=data_root, pipeline=pipeline))
    val_dataloader = dict(dataset=dict(data_root=data_root))
    test_dataloader = val_dataloader
    val_evaluator = dict(ann_file=data_root + 'annotations/instances_val2017.json')
    test_evaluator = val_evaluator
    param_scheduler = [dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=4)]
    train_cfg = dict(max_epochs=8, val_interval=8)
"""

MMSEG = """
    _base_ = ['mmseg::_base_/datasets/ade20k.py', 'mmseg::_base_/default_runtime.py']
    norm_cfg = dict(type='BN')
    model = dict(
        type='EncoderDecoder',
        data_preprocessor=dict(
            type='SegDataPreProcessor', mean=[127.0] * 3, std=[60.0] * 3, bgr_to_rgb=True, seg_pad_val=255,
            size_divisor=32),
        backbone=dict(type='VMamba', arch='test'),
        decode_head=dict(
            type='FCNHead', in_channels=16, in_index=0, channels=16, num_convs=1, dropout_ratio=0.0, num_classes=7,
            norm_cfg=norm_cfg, align_corners=False),
        train_cfg=dict(), test_cfg=dict(mode='whole'))
    pipeline = [
        dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', reduce_zero_label=True),
        dict(type='PackSegInputs')]
    data = dict(
        type='BaseSegDataset', data_root='{data}/ade20k/', reduce_zero_label=True, pipeline=pipeline,
        metainfo=dict(
            classes=('background', 'disc', 'rectangle', 'triangle', 'star', 'ring', 'cross'),
            palette=[[90, 90, 90], [230, 60, 60], [60, 130, 240], [60, 190, 80], [245, 190, 40], [170, 80, 220],
                     [40, 200, 210]]))
    train_dataloader = dict(dataset=dict(**data))
    val_dataloader = dict(dataset=dict(**data))
    test_dataloader = val_dataloader
    default_hooks = dict(
        timer=dict(type='IterTimerHook'), logger=dict(type='LoggerHook', log_metric_by_epoch=False),
        param_scheduler=dict(type='ParamSchedulerHook'),
        checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=8),
        sampler_seed=dict(type='DistSamplerSeedHook'), visualization=dict(type='SegVisualizationHook', interval=1))
    train_cfg = dict(type='IterBasedTrainLoop', max_iters=24, val_interval=24)
    val_cfg = dict(type='ValLoop')
    test_cfg = dict(type='TestLoop')
"""

MMPRETRAIN = """
    _base_ = ['mmpretrain::_base_/default_runtime.py']
    model = dict(
        type='ImageClassifier',
        data_preprocessor=dict(mean=[127.0] * 3, std=[60.0] * 3, to_rgb=True),
        backbone=dict(type='VMamba', arch='test', out_indices=(3, )),
        neck=dict(type='GlobalAveragePooling'),
        head=dict(
            type='LinearClsHead', num_classes=6, in_channels=128, loss=dict(type='CrossEntropyLoss'), topk=(1, )))
    data = dict(
        type='ImageNet', data_root='{data}/imagenet/',
        metainfo=dict(classes=('disc', 'rectangle', 'triangle', 'star', 'ring', 'cross')),
        pipeline=[dict(type='LoadImageFromFile'), dict(type='PackInputs')])
    train_dataloader = dict(sampler=dict(type='DefaultSampler', shuffle=True), dataset=dict(split='train', **data))
    val_dataloader = dict(sampler=dict(type='DefaultSampler', shuffle=False), dataset=dict(split='val', **data))
    test_dataloader = val_dataloader
    val_evaluator = dict(type='Accuracy', topk=(1, ))
    test_evaluator = val_evaluator
    train_cfg = dict(by_epoch=True, max_epochs=8, val_interval=8)
    val_cfg = dict()
    test_cfg = dict()
"""

TEMPLATES = {'mmdet': MMDET, 'mmseg': MMSEG, 'mmpretrain': MMPRETRAIN}

WriteConfig = Callable[..., Path]


@pytest.fixture
def environment() -> dict[str, str]:
    """The environment for commands: this package first on the path, and the same arithmetic as in this process."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))
    return {**os.environ, 'PYTHONPATH': path, 'PYTHON': sys.executable, 'OMP_NUM_THREADS': str(torch.get_num_threads())}


ReadLosses = Callable[[Path], dict[int, float]]


@pytest.fixture(scope='session')
def train(forget_runs: Callable[[], None], quick_starts: None) -> Callable[..., Any]:
    """``runner.train`` as a new process would run it, with the options' fields as arguments."""
    from ssm_backbones.engine import runner

    def run(*args: Any, **kwargs: Any) -> Any:
        forget_runs()
        return runner.train(runner.TrainOptions(*map(str, args), **kwargs))

    return run


@pytest.fixture(scope='session')
def test(forget_runs: Callable[[], None], quick_starts: None) -> Callable[..., dict[str, float]]:
    """``runner.test`` as a new process would run it, with the options' fields as arguments."""
    from ssm_backbones.engine import runner

    def run(*args: Any, **kwargs: Any) -> dict[str, float]:
        forget_runs()
        return runner.test(runner.TestOptions(*map(str, args), **kwargs))

    return run


@pytest.fixture(scope='session')
def read_losses() -> ReadLosses:
    """Reads the logged losses of a work dir by iteration; where several runs logged one, the last counts."""

    def read(work_dir: Path) -> dict[int, float]:
        losses = {}
        for log in sorted(work_dir.glob('*/vis_data/scalars.json')):
            records = [json.loads(line) for line in log.read_text(encoding='utf-8').splitlines()]
            losses.update({record['iter']: record['loss'] for record in records if 'loss' in record})
        return losses

    return read


@pytest.fixture(scope='session')
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve training and four validation images of 64x64 pixels, in all formats."""
    from ssm_backbones.shapes.generate import make_shapes
    from ssm_backbones.shapes.options import ShapesOptions

    folder = tmp_path_factory.mktemp('shapes')
    make_shapes(folder, ShapesOptions(seed=3, train=12, val=4, size=(64, 64)))
    return folder


@pytest.fixture(scope='session')
def write_config(tmp_path_factory: pytest.TempPathFactory, shapes: Path) -> WriteConfig:
    """Writes a tiny config of a host library, with changes on top, under a name of its own, and returns its path."""

    def write(host: str, changes: str = '', data: Path | None = None) -> Path:
        if importlib.util.find_spec(host) is None:  # before a tool tells it in words of its own
            raise ModuleNotFoundError(f'{host} is not installed', name=host)
        folder = tmp_path_factory.mktemp('config')
        filled = TEMPLATES[host].replace('{root}', str(ROOT)).replace('{data}', str(data or shapes))
        (folder / 'host.py').write_text(textwrap.dedent(filled), encoding='utf-8')
        (folder / 'common.py').write_text("_base_ = 'host.py'\n" + textwrap.dedent(COMMON), encoding='utf-8')
        # mmengine keeps loggers and visualizers by the config's name and the second, so each gets a name of its own.
        path = folder / f'{host}_{folder.name}.py'
        path.write_text("_base_ = 'common.py'\n" + textwrap.dedent(changes), encoding='utf-8')
        return path

    return write
