"""The recipes' facts, spelt out for each family and task, and compared with the host libraries' own Swin configs."""

import pytest
from mmengine.config import Config

from tests.configs.catalogue import ZOO, config, pipeline

SWIN = {
    '1x': 'mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py',
    '3x': 'mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco.py',
    'seg': 'mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py',
    'cls': 'mmpretrain::swin_transformer/swin-tiny_16xb64_in1k.py',
}
IN1K = {
    'vmamba/vmamba-tiny_8xb128_in1k': dict(
        batch=1024, lr=1e-3, decay=0.05, warmup=20, floor=1e-5, ema=1e-4, clip=5.0, wrapper='AmpOptimWrapper'),
    'v2m/v2m-hier-base_8xb128_in1k': dict(
        batch=1024, lr=1e-3, decay=0.05, warmup=20, floor=1e-5, ema=1e-4, clip=5.0, wrapper='AmpOptimWrapper'),
    'v2m/v2m-tiny_8xb64_in1k': dict(
        batch=512, lr=5e-4, decay=0.1, warmup=5, floor=1e-5, ema=4e-5, clip=None, wrapper='OptimWrapper'),
    'v2m/v2m-small_8xb64_in1k': dict(
        batch=512, lr=1e-3, decay=0.05, warmup=5, floor=1e-5, ema=4e-5, clip=None, wrapper='OptimWrapper'),
    'mamba2d/mamba2d-nano_32xb128_in1k': dict(
        batch=4096, lr=4e-3, decay=0.025, warmup=15, floor=1e-6, ema=1e-3, clip=None, wrapper='BFloat16OptimWrapper'),
    'mamba2d/mamba2d-small_32xb128_in1k': dict(
        batch=4096, lr=4e-3, decay=0.05, warmup=15, floor=1e-6, ema=1e-3, clip=None, wrapper='BFloat16OptimWrapper'),
}
# arch: (ImageNet, detection, segmentation)
DROP_PATH = {
    'vmamba/tiny': (0.2, 0.2, 0.2), 'vmamba/small': (0.3, 0.3, 0.3), 'vmamba/base': (0.6, 0.6, 0.6),
    'vmamba/tiny-s2l5': (0.2, 0.2, 0.2), 'vmamba/small-s1l20': (0.3, None, None),
    'vmamba/base-s1l20': (0.5, None, None), 'vmamba/tiny-v0': (0.2, 0.2, 0.2), 'vmamba/small-v0': (0.3, 0.3, 0.3),
    'vmamba/base-v0': (0.5, 0.5, 0.5), 'mamba2d/nano': (0.0, 0.0, 0.0), 'mamba2d/tiny': (0.175, 0.175, 0.175),
    'mamba2d/small': (0.4, 0.2, 0.2), 'v2m/tiny': (0.0, 0.0, 0.0), 'v2m/small': (0.05, 0.05, 0.05),
    'v2m/hier-small': (0.2, 0.2, 0.2), 'v2m/hier-base': (0.3, 0.3, 0.3),
}
DET = [name for name in ZOO if '/mask-rcnn_' in name]
SEG = [name for name in ZOO if '_upernet_' in name]
CLS = [name for name in ZOO if name.endswith('_in1k')]


@pytest.fixture(scope='module')
def swin(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Config]:
    """The host libraries' Swin configs, from which the papers' recipes come."""
    folder = tmp_path_factory.mktemp('swin')
    configs = {}
    for key, name in SWIN.items():
        (folder / f'{key}.py').write_text(f"_base_ = '{name}'\n")
        configs[key] = Config.fromfile(folder / f'{key}.py')
    return configs


@pytest.mark.parametrize('name', IN1K)
def test_imagenet_recipe(name) -> None:
    cfg, fact = config(name), IN1K[name]
    wrapper = cfg.optim_wrapper
    assert (wrapper.type, wrapper.optimizer.type) == (fact['wrapper'], 'AdamW')
    assert (wrapper.optimizer.lr, wrapper.optimizer.weight_decay) == (fact['lr'], fact['decay'])
    assert tuple(wrapper.optimizer.betas) == (0.9, 0.999)
    assert (wrapper.get('clip_grad') or dict(max_norm=None))['max_norm'] == fact['clip']
    assert cfg.auto_scale_lr.base_batch_size == fact['batch']
    warmup, main = cfg.param_scheduler
    assert (warmup.type, warmup.begin, warmup.end) == ('LinearLR', 0, fact['warmup'])
    assert (main.type, main.begin, main.end, main.eta_min) == ('CosineAnnealingLR', fact['warmup'], 300, fact['floor'])
    assert warmup.convert_to_iter_based and main.convert_to_iter_based and cfg.train_cfg.max_epochs == 300
    (hook,) = cfg.custom_hooks
    assert (hook.type, hook.momentum) == ('EMAHook', fact['ema'])
    if fact['warmup'] == 20:
        assert warmup.start_factor * fact['lr'] == pytest.approx(1e-6)


@pytest.mark.parametrize('name', CLS)
def test_imagenet_regularisation(name) -> None:
    model = config(name).model
    assert (model.head.num_classes, model.head.loss.label_smooth_val) == (1000, 0.1)
    assert {augment.type: augment.alpha for augment in model.train_cfg.augments} == {'Mixup': 0.8, 'CutMix': 1.0}
    assert model.get('init_cfg') is None


@pytest.mark.parametrize('name', CLS)
def test_imagenet_pictures(name, swin) -> None:
    cfg = config(name)
    train, test = (pipeline(cfg[f'{mode}_dataloader'].dataset.pipeline) for mode in ('train', 'test'))
    host_train, host_test = (pipeline(swin['cls'][f'{mode}_dataloader'].dataset.pipeline) for mode in ('train', 'test'))
    if not name.startswith('mamba2d/'):
        assert (train, test) == (host_train, host_test)
    else:
        # Each interpolating step is the host's own, drawn bilinear or bicubic; two draws of one policy are one of two.
        crop, policies = host_train[1], host_train[3] | dict(num_policies=1)
        crops = [[crop | dict(interpolation=kind)] for kind in ('bilinear', 'bicubic')]
        drawn = [[policies | dict(hparams=policies['hparams'] | dict(interpolation=kind))]
                 for kind in ('bilinear', 'bicubic')]
        choice = dict(type='RandomChoice', transforms=drawn)
        assert train == [host_train[0], dict(type='RandomChoice', transforms=crops), host_train[2], choice, choice,
                         *host_train[4:]]
        assert host_train[3]['num_policies'] == 2
        assert test == [host_test[0], host_test[1] | dict(scale=224), *host_test[2:]]
    sampler = cfg.train_dataloader.sampler
    plain = name.startswith('v2m/') and 'hier' not in name
    expected = ('RepeatAugSampler', 3) if plain else ('DefaultSampler', None)
    assert (sampler.type, sampler.get('num_repeats')) == expected


@pytest.mark.parametrize('name', DET)
def test_coco_recipe_is_swin_s(name, swin) -> None:
    cfg, host = config(name), swin['3x' if 'ms-crop-3x' in name else '1x']
    for mode in ('train', 'val', 'test'):
        ours, theirs = (each[f'{mode}_dataloader'] for each in (cfg, host))
        assert pipeline([ours]) == pipeline([theirs])
    assert pipeline(cfg.param_scheduler) == pipeline(host.param_scheduler)
    assert cfg.train_cfg.max_epochs == host.train_cfg.max_epochs
    assert pipeline([cfg.optim_wrapper.optimizer]) == pipeline([host.optim_wrapper.optimizer])
    assert pipeline([cfg.val_evaluator]) == pipeline([host.val_evaluator])
    assert pipeline([cfg.model.roi_head, cfg.model.rpn_head, cfg.model.train_cfg, cfg.model.test_cfg]) == pipeline(
        [host.model.roi_head, host.model.rpn_head, host.model.train_cfg, host.model.test_cfg])
    clip, norm = cfg.optim_wrapper.get('clip_grad'), cfg.model.neck.get('norm_cfg')
    if name.startswith('mamba2d/'):
        assert (clip, norm) == (dict(max_norm=1.0), dict(type='GN', num_groups=32))
    else:
        assert (clip, norm) == (None, None)


def test_coco_schedules() -> None:
    for name, milestones in (('1x', [8, 11]), ('ms-crop-3x', [27, 33])):
        cfg = config(f'vmamba/mask-rcnn_vmamba-tiny_fpn_{name}_coco')
        warmup, main = cfg.param_scheduler
        assert (warmup.end, warmup.by_epoch, main.milestones) == (1000, False, milestones)
        assert (cfg.optim_wrapper.optimizer.lr, cfg.optim_wrapper.optimizer.weight_decay) == (1e-4, 0.05)


@pytest.mark.parametrize('name', SEG)
def test_ade20k_recipe_is_swin_s(name, swin) -> None:
    cfg, host = config(name), swin['seg']
    for mode in ('train', 'val', 'test'):
        assert pipeline([cfg[f'{mode}_dataloader']]) == pipeline([host[f'{mode}_dataloader']])
    assert pipeline(cfg.param_scheduler) == pipeline(host.param_scheduler)
    assert (cfg.train_cfg.max_iters, cfg.train_dataloader.batch_size) == (160000, 2)
    optimizer = cfg.optim_wrapper.optimizer
    assert (optimizer.type, optimizer.lr) == ('AdamW', 6e-5)
    mamba2d = name.startswith('mamba2d/')
    assert optimizer.weight_decay == (0.05 if mamba2d else 0.01)
    assert cfg.optim_wrapper.get('clip_grad') == (dict(max_norm=1.0) if mamba2d else None)
    for head in ('decode_head', 'auxiliary_head'):
        ours, theirs = ({key: value for key, value in pipeline([each.model[head]])[0].items() if key != 'in_channels'}
                        for each in (cfg, host))
        assert ours == theirs and ours['norm_cfg']['type'] == 'SyncBN' and ours['num_classes'] == 150
    assert tuple(cfg.model.data_preprocessor.size) == (512, 512)


@pytest.mark.parametrize('name', SEG)
def test_ade20k_multi_scale_testing(name, swin) -> None:
    cfg = config(name)
    assert pipeline(cfg.tta_pipeline) == pipeline(swin['seg'].tta_pipeline)
    scales, flips, *_ = cfg.tta_pipeline[-1].transforms
    assert [scale.scale_factor for scale in scales] == [0.5, 0.75, 1.0, 1.25, 1.5, 1.75]
    assert [flip.prob for flip in flips] == [0.0, 1.0]
    assert cfg.tta_model.type == 'SegTTAModel'


@pytest.mark.parametrize('name', ZOO)
def test_drop_path(name) -> None:
    cfg = config(name)
    task = ('mmpretrain', 'mmdet', 'mmseg').index(cfg.default_scope)
    backbone = cfg.model.backbone
    assert backbone.drop_path_rate == DROP_PATH[f"{name.partition('/')[0]}/{backbone.arch}"][task]


def test_mamba2d_head_dropout() -> None:
    rates = {name: config(name).model.head.dropout for name in CLS if name.startswith('mamba2d/')}
    assert rates == {f'mamba2d/mamba2d-{arch}_32xb128_in1k': rate
                     for arch, rate in (('nano', 0.0), ('tiny', 0.15), ('small', 0.4))}
