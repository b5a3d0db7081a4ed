"""The pages under docs/: every block of Python is run, as it stands."""

import re
from importlib import import_module
from pathlib import Path

import pytest
import torch
from mmengine.optim import build_optim_wrapper
from mmengine.registry import HOOKS, DefaultScope

from ssm_backbones import V2M, Mamba2D, VMamba
from ssm_backbones.apis.config import load_config
from ssm_backbones.checkpoints import convert_checkpoint
from ssm_backbones.flops import config_complexity
from tests.checkpoints.layouts import (
    MAMBA2D,
    VMAMBA,
    mamba2d_classifier,
    random_tensors,
    vmamba_classifier,
    vmamba_pyramid,
)

PAGE = Path(__file__).resolve().parents[2] / 'docs' / 'use_with_other_heads.md'
BLOCKS = re.findall(r'^```python\n(.*?)^```$', PAGE.read_text(encoding='utf-8'), re.MULTILINE | re.DOTALL)
CONFIGS = [block for block in BLOCKS if block.startswith('_base_')]
SCRIPTS = [block for block in BLOCKS if not block.startswith('_base_')]


def title(block):
    return re.sub(r'\W+', '-', block[:60])


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A folder with stand-ins for the files that the page names."""
    folder = tmp_path_factory.mktemp('docs')
    torch.manual_seed(0)

    def shrunk(layout):
        # Near zero, so that a network of that depth stays finite.
        return {name: tensor * 0.02 for name, tensor in random_tensors(layout).items()}

    for name, variant in [('vssm1_tiny_0230s_ckpt_epoch_264.pth', 'tiny-s1l8'),
                          ('vssm_small_0229_ckpt_epoch_222.pth', 'small-s2l15')]:
        torch.save({'model': shrunk(vmamba_classifier(**VMAMBA[variant]))}, folder / name)
    torch.save({'state_dict': shrunk(mamba2d_classifier(**MAMBA2D['tiny']))}, folder / 'M2D-T-backbone.ckpt')
    official = {f'backbone.{name}': tensor for name, tensor in shrunk(vmamba_pyramid(**VMAMBA['tiny-s1l8'])).items()}
    detector, _ = convert_checkpoint({'state_dict': {**official, 'neck.weight': torch.ones(2)}})
    torch.save(detector, folder / 'my_detector.pth')
    return folder


def test_there_are_blocks_of_both_kinds():
    assert len(CONFIGS) == 7 and len(SCRIPTS) == 2


@pytest.mark.parametrize('block', SCRIPTS, ids=title)
def test_scripts_run(block, folder, monkeypatch):
    monkeypatch.chdir(folder)
    namespace = {'__name__': 'snippet'}
    exec(compile(block, str(PAGE), 'exec'), namespace)
    if 'loss' in namespace:
        assert torch.isfinite(namespace['loss'])


@pytest.mark.parametrize('block', CONFIGS, ids=title)
def test_configs_build_run_and_load_their_weights(block, folder, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / 'my_config.py').write_text(block)
    cfg = load_config('my_config.py')
    # On small pictures: the heads fit the maps.
    assert config_complexity(cfg, 128, 96).flops > 0

    registry = import_module(f'{cfg.default_scope}.registry').MODELS
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        backbone = registry.build(cfg.model.backbone)
        before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
        backbone.init_weights()
        changed = {name for name, tensor in backbone.state_dict().items() if not torch.equal(tensor, before[name])}
        anew = set() if 'my_detector' in block or cfg.default_scope == 'mmpretrain' else {'norm0', 'norm1', 'norm2'}
        assert {name for name in before if name.partition('.')[0] not in anew} == changed
        with torch.device('meta'):
            model = registry.build(cfg.model)
        wrapper = build_optim_wrapper(model, cfg.optim_wrapper.to_dict() | dict(type='OptimWrapper'))
        hooks = [HOOKS.build(hook) for hook in cfg.get('custom_hooks', [])]
    rates = {group['lr'] for group in wrapper.optimizer.param_groups}
    if 'layer_decay_rate' in block:
        # The second stage's first block, of 14, is the lowest that is not frozen.
        assert min(rates) == pytest.approx(1e-4 * 0.9**12) and max(rates) == 1e-4
        assert [type(hook).__name__ for hook in hooks] == ['EMAHook']


def test_the_table_of_channels_is_right():
    page = PAGE.read_text(encoding='utf-8')
    with torch.device('meta'):
        rows = [('VMamba tiny, small; V2M hier-small, hier-base',
                 [VMamba('tiny'), VMamba('small'), V2M('hier-small'), V2M('hier-base')]),
                ('VMamba base', [VMamba('base')]), ('Mamba2D nano', [Mamba2D('nano')]),
                ('Mamba2D tiny', [Mamba2D('tiny')]), ('Mamba2D small', [Mamba2D('small')])]
        pyramids = [V2M(arch, pyramid='multi') for arch in ('tiny', 'small')]
    for label, backbones in rows:
        for backbone in backbones:
            assert f'| {label} | {", ".join(map(str, backbone.out_channels))} | 4, 8, 16, 32 |' in page
    assert [pyramid.out_channels for pyramid in pyramids] == [(48, 96, 192, 192), (96, 192, 384, 384)]
