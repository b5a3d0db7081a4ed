"""Representatives of each family and task, and each other head, train and test by the package's own commands.

The models are the configs' own in full; only pictures, batches and schedules are smaller.
"""

import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, MODELS, DefaultScope
from torch import Tensor

from ssm_backbones.engine import runner
from tests.configs.catalogue import config

SIDE = 128
CONFIGS = (
    'vmamba/vmamba-tiny_8xb128_in1k',
    'v2m/v2m-hier-small_8xb128_in1k',
    'v2m/v2m-tiny_8xb64_in1k',
    'mamba2d/mamba2d-nano_32xb128_in1k',
    'vmamba/mask-rcnn_vmamba-tiny_fpn_ms-crop-3x_coco',
    'v2m/mask-rcnn_v2m-hier-small_fpn_1x_coco',
    'v2m/mask-rcnn_v2m-tiny_fpn_1x_coco',
    'mamba2d/mask-rcnn_mamba2d-nano_fpn_1x_coco',
    'vmamba/vmamba-tiny_upernet_8xb2-160k_ade20k-512x512',
    'v2m/v2m-hier-small_upernet_8xb2-160k_ade20k-512x512',
    'v2m/v2m-tiny_upernet_8xb2-160k_ade20k-512x512',
    'mamba2d/mamba2d-nano_upernet_8xb2-160k_ade20k-512x512',
    'vmamba/cascade-mask-rcnn_vmamba-tiny_fpn_1x_coco',
    'vmamba/dino-4scale_vmamba-tiny_8xb2-12e_coco',
    'vmamba/vmamba-tiny_segformer_8xb2-160k_ade20k-512x512',
)
METRICS = {'mmpretrain': 'accuracy/top1', 'mmdet': 'coco/bbox_mAP', 'mmseg': 'mIoU'}


@HOOKS.register_module(force=True)
class RecordSteps(Hook):
    """Keeps each step's losses, the backbone's weights before the first, and which of them get a gradient."""

    def __init__(self) -> None:
        self.losses: list[dict[str, float]] = []
        self.reached: set[str] = set()

    def before_train(self, runner: Any) -> None:
        parameters = dict(runner.model.backbone.named_parameters())
        self.before = {key: value.detach().clone() for key, value in parameters.items()}
        for key, value in parameters.items():
            value.register_hook(functools.partial(self.note, key))

    def note(self, key: str, gradient: Tensor) -> None:
        assert torch.isfinite(gradient).all(), key
        if gradient.any():
            self.reached.add(key)

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self.losses.append({key: float(value.detach()) for key, value in outputs.items() if 'loss' in key})


def shrink(cfg: Config) -> None:
    """Two steps of two small pictures and a test, from no other weights, on a CPU."""
    cfg.model.backbone.init_cfg = None
    cfg.randomness = dict(seed=0)
    if cfg.optim_wrapper.type == 'AmpOptimWrapper':
        cfg.optim_wrapper.type = 'BFloat16OptimWrapper'
    for schedule in cfg.param_scheduler:
        if schedule.type == 'LinearLR':
            # The warm-up's first steps would be too small to see.
            schedule.start_factor = 1.0
    for mode in ('train', 'val', 'test'):
        loader = cfg[f'{mode}_dataloader']
        loader.update(batch_size=2 if mode == 'train' else 1, num_workers=0, persistent_workers=False)
        if cfg.default_scope != 'mmpretrain':
            shrink_pictures(loader.dataset.pipeline)
    if cfg.default_scope == 'mmseg':
        cfg.model.data_preprocessor.size = (SIDE, SIDE)
        cfg.train_cfg.update(max_iters=2, val_interval=2)
    else:
        cfg.train_dataloader.dataset.indices = 4
        cfg.train_cfg.update(max_epochs=1, val_interval=1)
    if 'roi_head' in cfg.model:
        shrink_proposals(cfg.model)
    if 'num_queries' in cfg.model:
        # The small pictures have fewer places than the 900 queries.
        cfg.model.num_queries = 100
    cfg.default_hooks.checkpoint.update(save_optimizer=False, save_param_scheduler=False, save_last=False,
                                        interval=1000)
    cfg.custom_hooks = [*cfg.get('custom_hooks', []), dict(type='RecordSteps')]


def shrink_proposals(model: ConfigDict) -> None:
    """Fewer regions, and none of them left out for its low score."""
    stages = model.train_cfg.rcnn
    for stage in stages if isinstance(stages, list) else [stages]:
        stage.sampler.num = 32
    model.train_cfg.rpn_proposal.max_per_img = 100
    model.test_cfg.rpn.max_per_img = 50
    model.test_cfg.rcnn.update(score_thr=0.0, max_per_img=10)


def shrink_pictures(value: Any) -> None:
    """Bound the sides of what the transforms make."""
    if isinstance(value, (list, tuple)):
        for inner in value:
            shrink_pictures(inner)
    elif isinstance(value, ConfigDict):
        for key in ('scale', 'crop_size'):
            if key in value:
                value[key] = (SIDE, SIDE)
        if 'scales' in value:
            value.scales = [(SIDE, SIDE), (SIDE - 24, SIDE)]
        for inner in value.values():
            shrink_pictures(inner)


@pytest.mark.parametrize('name', CONFIGS)
def test_trains_and_tests(name, beside_data, tmp_path) -> None:
    cfg = config(name)
    shrink(cfg)
    path = tmp_path / f"{name.replace('/', '_')}.py"
    cfg.dump(path)
    done = runner.train(runner.TrainOptions(str(path), work_dir=str(tmp_path / 'work')))

    (record,) = [hook for hook in done.hooks if isinstance(hook, RecordSteps)]
    assert len(record.losses) == 2
    assert all(losses and all(math.isfinite(value) for value in losses.values()) for losses in record.losses)
    after = dict(done.model.backbone.named_parameters())
    assert not after.keys() - record.reached
    # A gradient far below Adam's epsilon moves nothing that can be seen; such are some of the step sizes' biases.
    still = [key for key, value in record.before.items() if torch.equal(value, after[key])]
    assert not [key for key in still if key.endswith('.weight')]
    metrics = done.message_hub.log_scalars
    assert math.isfinite(metrics[f'val/{METRICS[cfg.default_scope]}'].current())


@pytest.mark.parametrize('tta', [False, True], ids=['single-scale', 'multi-scale'])
def test_segmentation_tests_at_one_scale_and_at_many(tta, beside_data, tmp_path) -> None:
    cfg = config('mamba2d/mamba2d-nano_upernet_8xb2-160k_ade20k-512x512')
    shrink(cfg)
    path = tmp_path / 'multi_scale.py'
    cfg.dump(path)
    checkpoint = tmp_path / 'random.pth'
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        torch.save(dict(state_dict=MODELS.build(cfg.model).state_dict()), checkpoint)
    metrics = runner.test(runner.TestOptions(str(path), str(checkpoint), work_dir=str(tmp_path / 'work'), tta=tta,
                                             out=str(tmp_path / 'maps')))
    assert math.isfinite(metrics['mIoU'])
    assert len(list(Path(tmp_path / 'maps').glob('*.png'))) == 2
