"""Every config loads and builds, and stands in the metafile beside it."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope

from ssm_backbones.runner import load_config

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted(path for path in (ROOT / 'configs').glob('*/*.py') if path.parent.name != '_base_')
METAFILES = sorted((ROOT / 'configs').glob('*/metafile.yml'))
COCO = ROOT / 'configs/vmamba/mask-rcnn_vmamba-tiny_fpn_1x_coco.py'
DEMO = ROOT / 'configs/vmamba/mask-rcnn_vmamba-nano_fpn_demo_shapes.py'


def models_of(metafile: Path) -> list[dict[str, Any]]:
    return yaml.safe_load(metafile.read_text(encoding='utf-8'))['Models']


def build(config: Path):
    cfg = load_config(config)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        return cfg, MODELS.build(cfg.model)


def types(config: Any, key: str = 'model') -> Iterator[tuple[str, str]]:
    """Every component of a model config with its place."""
    if isinstance(config, Mapping):
        if 'type' in config:
            yield key, config['type']
        for name, value in config.items():
            yield from types(value, f'{key}.{name}')


def test_there_are_configs() -> None:
    assert {COCO, DEMO} <= set(CONFIGS)


@pytest.mark.parametrize('config', CONFIGS, ids=lambda path: path.stem)
def test_builds(config) -> None:
    cfg, model = build(config)
    assert cfg.custom_imports == dict(imports=['ssm_backbones'], allow_failed_imports=False)
    assert type(model.backbone).__module__.startswith('ssm_backbones.')
    assert not any(torch.isnan(parameter).any() for parameter in model.parameters())


@pytest.mark.parametrize('config', CONFIGS, ids=lambda path: path.stem)
def test_scan_parameters_and_norms_do_not_decay(config) -> None:
    cfg, model = build(config)
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    decays = {id(parameter): group['weight_decay'] for group in wrapper.param_groups for parameter in group['params']}
    spared = ('A_log', '.D', 'dt_bias', '.norm')
    for name, parameter in model.backbone.named_parameters():
        if any(part in f'.{name}' for part in spared):
            assert decays[id(parameter)] == 0, name
    assert decays[id(model.backbone.stages[0].blocks[0].mixer.out_proj.weight)] > 0


@pytest.mark.parametrize('config', CONFIGS, ids=lambda path: path.stem)
def test_stands_in_the_metafile(config) -> None:
    (entry,) = [model for model in models_of(config.parent / 'metafile.yml') if model['Name'] == config.stem]
    assert ROOT / entry['Config'] == config


@pytest.mark.parametrize('metafile', METAFILES, ids=lambda path: path.parent.name)
def test_metafile_names_only_what_exists(metafile) -> None:
    content = yaml.safe_load(metafile.read_text(encoding='utf-8'))
    collections = {collection['Name'] for collection in content['Collections']}
    for model in content['Models']:
        assert (ROOT / model['Config']).is_file()
        assert model['In Collection'] in collections


def test_coco_recipe() -> None:
    cfg = load_config(COCO)
    optimizer = cfg.optim_wrapper.optimizer
    assert (optimizer.type, optimizer.lr, optimizer.weight_decay) == ('AdamW', 1e-4, 0.05)
    warmup, steps = cfg.param_scheduler
    assert (warmup.type, warmup.end, warmup.by_epoch) == ('LinearLR', 1000, False)
    assert (steps.type, steps.milestones, cfg.train_cfg.max_epochs) == ('MultiStepLR', [8, 11], 12)
    assert cfg.auto_scale_lr.base_batch_size == 16 == 8 * cfg.train_dataloader.batch_size
    assert (cfg.model.backbone.arch, cfg.model.backbone.drop_path_rate) == ('tiny', 0.2)
    assert cfg.model.neck.in_channels == [96, 192, 384, 768]


def test_the_demo_has_the_coco_config_s_components() -> None:
    coco, demo = load_config(COCO), load_config(DEMO)
    assert dict(types(demo.model)) == dict(types(coco.model))
    for key in (
        'train_dataloader.dataset.type',
        'val_evaluator.type',
        'optim_wrapper.optimizer.type',
        'optim_wrapper.type',
    ):
        values = []
        for node in (coco, demo):
            for name in key.split('.'):
                node = node[name]
            values.append(node)
        assert values[0] == values[1], key
