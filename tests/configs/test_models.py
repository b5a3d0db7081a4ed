"""Every config's model builds, fits together, and lets what must not decay be."""

import pytest
from torch import nn

from ssm_backbones.demo.catalogue import TASKS
from tests.configs.catalogue import DEMOS, HOSTS, NAMES, ZOO, config, entries, model, types
from tests.configs.recipes import RECIPES, parameter_groups

FAMILIES = {'vmamba': 'VMamba', 'v2m': 'V2M', 'mamba2d': 'Mamba2D'}
UNDECAYED = ('A_log', 'D', 'dt_bias', 'pos_embed', 'cls_token')


def test_every_family_and_host_has_configs() -> None:
    assert {name.partition('/')[0] for name in ZOO} == set(FAMILIES)
    assert {config(name).default_scope for name in ZOO} == set(HOSTS)


@pytest.mark.parametrize('name', NAMES)
def test_parts_fit_together(name) -> None:
    cfg, built = config(name), model(name)
    assert cfg.model.backbone.type == FAMILIES[name.partition('/')[0]]
    channels = list(built.backbone.out_channels)
    if cfg.default_scope == 'mmdet':
        assert channels == cfg.model.neck.in_channels
    elif cfg.default_scope == 'mmseg':
        assert channels == cfg.model.decode_head.in_channels
        if 'auxiliary_head' in cfg.model:
            # On the third stage, as in Swin's UPerNet.
            assert (channels[2], 2) == (cfg.model.auxiliary_head.in_channels, cfg.model.auxiliary_head.in_index)
    else:
        assert channels == [cfg.model.head.in_channels]


@pytest.mark.parametrize('name', NAMES)
def test_package_is_imported(name) -> None:
    imports = config(name).custom_imports
    assert 'ssm_backbones' in imports.imports and not imports.allow_failed_imports


@pytest.mark.parametrize(
    'name', [name for name in NAMES if name not in ZOO or 'no_weight_decay' not in RECIPES[name].published()]
)
def test_scan_parameters_and_norms_do_not_decay(name) -> None:
    """Also where no author says what decays; test_recipes.py compares the others."""
    built, full = model(name), config(name).optim_wrapper.optimizer.weight_decay
    groups = parameter_groups(name)
    flat_too = config(name).default_scope == 'mmpretrain' or name.startswith('mamba2d/')
    norms = {key for key, module in built.named_modules() if isinstance(module, (nn.LayerNorm, nn.RMSNorm))}
    backbone = {key: parameter for key, parameter in built.named_parameters() if key.startswith('backbone.')}
    assert norms and backbone
    for key, parameter in backbone.items():
        owner, _, last = key.rpartition('.')
        decay = groups[key].get('weight_decay', full)
        if owner in norms or last in UNDECAYED or (flat_too and parameter.ndim == 1):
            assert decay == 0, key
        elif last in ('weight', 'dt_weight') and parameter.ndim > 1:
            assert decay == full, key


@pytest.mark.parametrize('name', ZOO)
def test_parameters_are_as_many_as_published(name) -> None:
    """What the metafile says is rounded to its last digit, or cut off there, as the authors did."""
    published = entries()[name]['Metadata'].get('Parameters (M)')
    if published is None:
        assert name.startswith('v2m/') or entries()[name]['Metadata']['Figures'] == 'none published'
        return
    millions = sum(parameter.numel() for parameter in model(name).parameters()) / 1e6
    digits = len(str(published).partition('.')[2])
    # V2M's plain and hierarchical variants: the paper gives whole millions, and for the latter no more than these.
    tolerance = 1.0 if name.startswith('v2m/') else 10.0**-digits
    assert abs(millions - published) < tolerance, f'{millions:.3f} M'


@pytest.mark.parametrize('name', ZOO)
def test_published_imagenet_weights_start_detection_and_segmentation(name) -> None:
    """They are the ones that the metafile gives to the same backbone's ImageNet config."""
    backbone = config(name).model.backbone
    init_cfg = backbone.get('init_cfg')
    if config(name).default_scope == 'mmpretrain' or name.startswith('v2m/'):
        assert init_cfg is None
        return
    (weights,) = {
        entries()[other]['Weights']
        for other in ZOO
        if config(other).default_scope == 'mmpretrain'
        and config(other).model.backbone.arch == backbone.arch
        and other.partition('/')[0] in name
    }
    assert (init_cfg.type, init_cfg.checkpoint) == ('OfficialPretrained', weights)


@pytest.mark.parametrize('name', DEMOS)
def test_demos_scale_their_learning_rate_from_their_own_batch(name) -> None:
    cfg = config(name)
    assert cfg.auto_scale_lr.base_batch_size == cfg.train_dataloader.batch_size


@pytest.mark.parametrize('name', [name for name in DEMOS if config(name).default_scope != 'mmdet'])
def test_demo_classifiers_and_segmentors_see_small_images_and_then_those_of_the_test(name) -> None:
    cfg = config(name)
    task = TASKS['cls' if cfg.default_scope == 'mmpretrain' else 'seg']
    (switch,) = (step for hook in cfg.custom_hooks for step in hook.get('schedule', []))
    small, whole = ({step.type: step for step in steps} for steps in (cfg.small_pipeline, switch.train_pipeline))
    assert cfg.train_dataloader.dataset.pipeline == cfg.small_pipeline
    if cfg.default_scope == 'mmpretrain':
        assert small.pop('RandomResizedCrop').scale < whole.pop('RandomResizedCrop').scale == task.options.size[0]
    else:
        # The images are as large as those of the test where nothing resizes them.
        assert small.pop('Resize').scale < task.options.size
    assert small == whole
    assert 1 < switch.action_epoch <= cfg.train_cfg.max_epochs


@pytest.mark.parametrize('name', DEMOS)
def test_demos_have_the_components_of_the_real_configs(name) -> None:
    """A demo shows what the real recipe does: same parts, another size."""
    demo = config(name)
    real = [
        config(other)
        for other in ZOO
        if other.partition('/')[0] == name.partition('/')[0] and config(other).default_scope == demo.default_scope
    ]

    def parts(cfg) -> dict[str, str]:
        # What a training of minutes from scratch needs is no part of the model: which pixels a segmentor's loss counts,
        # and norms behind the backbone.
        left_out = ('init_cfg', 'decode_head.sampler', 'norm_cfg')
        # mmdet's box head of two linear layers is its head of any number of convolutions and linear layers.
        same = {'Shared2FCBBoxHead': 'ConvFCBBoxHead'}
        return {key: same.get(value, value) for key, value in types(cfg.model) if not key.endswith(left_out)}

    assert any(parts(demo) == parts(cfg) for cfg in real)
