"""Configs made small enough to train within a test, and a hook that tells what the training did."""

import copy
import functools
from typing import Any

import torch
from mmengine.config import Config, ConfigDict
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from torch import Tensor


@HOOKS.register_module(force=True)
class RecordSteps(Hook):
    """Keeps what a training did.

    Attributes:
        losses: each step's.
        start, end: the loss of the first step's batch, before that step and after the last one.
        before: the backbone's weights before the first step.
        touched: the model's parameters that took part in a loss.
        reached: those of them whose gradient was not zero.
        groups: what the optimizer has for each parameter, with the learning rate before any schedule.
    """

    def __init__(self) -> None:
        self.losses: list[dict[str, float]] = []
        self.touched: set[str] = set()
        self.reached: set[str] = set()
        self.groups: dict[str, dict[str, Any]] = {}

    def before_train(self, runner: Any) -> None:
        parameters = {key: value for key, value in runner.model.named_parameters() if value.requires_grad}
        self.before = {key: value.detach().clone() for key, value in runner.model.backbone.named_parameters()}
        self.optimizer = type(runner.optim_wrapper.optimizer).__name__
        groups = {id(value): group for group in runner.optim_wrapper.param_groups for value in group['params']}
        for key, value in parameters.items():
            group = groups[id(value)]
            self.groups[key] = dict(lr=group.get('initial_lr', group['lr']), weight_decay=group['weight_decay'])
            value.register_hook(functools.partial(self.note, key))

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        if not self.losses:
            self.first = copy.deepcopy(data_batch)
            self.start = self.loss_of_first(runner.model)

    def after_train(self, runner: Any) -> None:
        runner.model.train()
        self.end = self.loss_of_first(runner.model)

    @torch.no_grad()
    def loss_of_first(self, model: Any) -> float:
        # What is dropped and sampled is the same each time; nothing that follows is drawn otherwise for it.
        with torch.random.fork_rng():
            torch.manual_seed(0)
            losses = model(**model.data_preprocessor(copy.deepcopy(self.first), True), mode='loss')
        return float(model.parse_losses(losses)[0])

    def note(self, key: str, gradient: Tensor) -> None:
        assert torch.isfinite(gradient).all(), key
        self.touched.add(key)
        if gradient.any():
            self.reached.add(key)

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self.losses.append({key: float(value.detach()) for key, value in outputs.items() if 'loss' in key})


def shrink(cfg: Config, epochs: int = 1, side: int = 128) -> None:
    """Two steps of two small pictures in each of so many epochs and a test, from no other weights, on a CPU."""
    cfg.model.backbone.init_cfg = None
    cfg.randomness = dict(seed=0)
    if cfg.optim_wrapper.get('type') == 'AmpOptimWrapper':
        cfg.optim_wrapper.type = 'BFloat16OptimWrapper'
    for schedule in cfg.param_scheduler if isinstance(cfg.param_scheduler, list) else [cfg.param_scheduler]:
        if schedule.type == 'LinearLR':
            # The warm-up's first steps would be too small to see.
            schedule.start_factor = 1.0
    for mode in ('train', 'val', 'test'):
        loader = cfg[f'{mode}_dataloader']
        loader.update(batch_size=2 if mode == 'train' else 1, num_workers=0, persistent_workers=False)
        if cfg.default_scope != 'mmpretrain':
            shrink_pictures(loader.dataset.pipeline, side)
    if cfg.default_scope == 'mmseg':
        cfg.model.data_preprocessor.size = (side, side)
        cfg.train_cfg.update(max_iters=2 * epochs, val_interval=2 * epochs)
    else:
        cfg.train_dataloader.dataset.indices = 4
        cfg.train_cfg.update(max_epochs=epochs, val_interval=epochs)
    if 'roi_head' in cfg.model:
        shrink_proposals(cfg.model)
    if 'num_queries' in cfg.model:
        # The small pictures have fewer places than the 900 queries.
        cfg.model.num_queries = 100
    cfg.default_hooks.checkpoint.update(
        save_optimizer=False, save_param_scheduler=False, save_last=False, interval=1000
    )
    cfg.custom_hooks = [*cfg.get('custom_hooks', []), dict(type='RecordSteps')]


def shrink_proposals(model: ConfigDict) -> None:
    """Fewer regions, and none of them left out for its low score."""
    stages = model.train_cfg.rcnn
    for stage in stages if isinstance(stages, list) else [stages]:
        stage.sampler.num = 32
    model.train_cfg.rpn_proposal.max_per_img = 100
    model.test_cfg.rpn.max_per_img = 50
    model.test_cfg.rcnn.update(score_thr=0.0, max_per_img=10)


def shrink_pictures(value: Any, side: int) -> None:
    """Bound the sides of what the transforms make."""
    if isinstance(value, (list, tuple)):
        for inner in value:
            shrink_pictures(inner, side)
    elif isinstance(value, ConfigDict):
        for key in ('scale', 'crop_size'):
            if key in value:
                value[key] = (side, side)
        if 'scales' in value:
            value.scales = [(side, side), (side - 24, side)]
        for inner in value.values():
            shrink_pictures(inner, side)


def narrow_heads(model: ConfigDict, width: int) -> None:
    """So many channels in the necks and heads of mmdet's and mmseg's models."""
    if 'neck' in model and model.neck is not None:
        model.neck.out_channels = width
    for key in ('decode_head', 'auxiliary_head'):
        if key in model:
            model[key].channels = width
    roi = model.get('roi_head', {})
    for head in (model.get('rpn_head'), model.get('bbox_head'), roi.get('bbox_head'), roi.get('mask_head')):
        if head is not None:
            head.in_channels = width
            for key in ('feat_channels', 'conv_out_channels', 'fc_out_channels'):
                if key in head:
                    head[key] = width
    for extractor in (roi.get('bbox_roi_extractor'), roi.get('mask_roi_extractor')):
        if extractor is not None:
            extractor.out_channels = width
