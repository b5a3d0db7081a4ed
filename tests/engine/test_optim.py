"""Groups of parameters, and layer-wise learning rates: which one learns at which rate and decays or not."""

from pathlib import Path

import pytest
import torch
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS, DefaultScope
from torch import nn

import ssm_backbones  # noqa: F401
from ssm_backbones import V2M, Mamba2D, VMamba
from ssm_backbones.apis.config import load_config
from tests.checkpoints import hosts

LR, DECAY, RATE = 1e-3, 0.05, 0.5


def build(model, optimizer=None, constructor='LayerDecayOptimWrapperConstructor', **options):
    options = dict(layer_decay_rate=RATE) | options
    return build_optim_wrapper(
        model,
        dict(
            optimizer=optimizer or dict(type='AdamW', lr=LR, weight_decay=DECAY),
            constructor=constructor,
            paramwise_cfg={key: value for key, value in options.items() if value is not None},
        ),
    )


def settings(wrapper):
    """The learning rate and weight decay of each parameter."""
    return {
        name: (group['lr'], group.get('weight_decay'))
        for group in wrapper.optimizer.param_groups
        for name in group['param_names']
    }


class Model(nn.Module):
    """A backbone and a head, as a library's model has them."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Conv2d(4, 4, 3)


BACKBONES = {
    'vmamba': lambda: VMamba('test'),
    'vmamba-v0': lambda: VMamba(dict(embed_dims=16, depths=[1, 1, 2, 1], d_state=2, ssm_ratio=2.0, version='v0')),
    'v2m-plain': lambda: V2M('test', pyramid='multi', cls_token='corner'),
    'v2m-hierarchical': lambda: V2M('test-hier'),
    'mamba2d': lambda: Mamba2D('test'),
}


@pytest.mark.parametrize('family', BACKBONES)
def test_every_parameter_has_the_rate_of_its_layer(family):
    model = Model(BACKBONES[family]())
    found = settings(build(model))
    assert found.keys() == dict(model.named_parameters()).keys()
    backbone = model.backbone
    blocks = [f'backbone.stages.{s}.blocks.{b}.' for s, depth in enumerate(backbone.depths) for b in range(depth)]
    top = len(blocks) + 1
    for name, (lr, _) in found.items():
        layer = next((i for i, block in enumerate(blocks, 1) if name.startswith(block)), None)
        if layer is None and name.startswith('backbone.stages.'):
            # A downsampling, or the norm at a stage's end, goes with the stage's last block.
            stage = int(name.split('.')[2])
            layer = sum(backbone.depths[: stage + 1])
        elif layer is None:
            layer = 0 if name.startswith('backbone.patch_embed.') else top
        assert lr == pytest.approx(LR * RATE ** (top - layer)), name
    assert found['head.weight'] == (LR, DECAY)
    assert found[next(name for name in found if 'patch_embed' in name)][0] == pytest.approx(LR * RATE**top)


@pytest.mark.parametrize('family', BACKBONES)
def test_matrices_and_kernels_alone_decay(family):
    model = Model(BACKBONES[family]())
    found = settings(build(model))
    decaying = {name for name, (_, decay) in found.items() if decay == DECAY}
    assert {decay for _, decay in found.values()} == {0.0, DECAY}
    # Independently of how parameters are named: what multiplies activations as a matrix or a kernel.
    weights = {
        f'{name}.weight'
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.ConvTranspose2d)
    }
    weights |= {name for name in found if name.endswith('.dt_weight')}
    assert decaying == weights


def test_what_is_spared_by_name():
    plain = settings(build(V2M('test', cls_token='center')))
    vmamba, mamba2d = settings(build(VMamba('test'))), settings(build(Mamba2D('test')))
    for found, name in [
        (plain, 'patch_embed.pos_embed'),
        (plain, 'patch_embed.cls_token'),
        (plain, 'stages.0.blocks.0.norm.weight'),
        (vmamba, 'stages.0.blocks.0.mixer.A_log'),
        (vmamba, 'stages.0.blocks.0.mixer.D'),
        (vmamba, 'stages.0.blocks.0.mixer.dt_bias'),
        (mamba2d, 'stages.0.blocks.0.residual1.scale'),
        (mamba2d, 'stages.1.blocks.0.mixer.top.A_log'),
        (mamba2d, 'stages.0.blocks.0.mixer.local.act1.scale'),
    ]:
        assert found[name][1] == 0.0, name


@pytest.mark.parametrize('scope', ['mmengine', 'mmpretrain', 'mmdet', 'mmseg'])
def test_models_of_all_libraries(scope):
    backbone = dict(type='VMamba', arch='test')
    model = {
        'mmengine': lambda: Model(VMamba('test')),
        'mmpretrain': lambda: hosts.classifier(backbone, 128),
        'mmdet': lambda: hosts.detector(backbone, [16, 32, 64, 128]),
        'mmseg': lambda: hosts.segmentor(backbone, [16, 32, 64, 128]),
    }[scope]()
    with DefaultScope.overwrite_default_scope(scope):
        found = settings(build(model))
    assert found['backbone.patch_embed.first.conv.weight'] == (pytest.approx(LR * RATE**6), DECAY)
    assert found['backbone.stages.2.blocks.1.mlp.fc1.weight'] == (pytest.approx(LR * RATE**2), DECAY)
    assert found['backbone.norm3.weight'] == (LR, 0.0)
    rest = {name: value for name, value in found.items() if not name.startswith('backbone.')}
    assert rest and all(lr == LR for lr, _ in rest.values())
    assert all(decay == 0.0 for name, (_, decay) in rest.items() if name.endswith('bias'))


def test_there_are_no_other_constructors_of_that_name():
    for library in ('mmpretrain', 'mmdet', 'mmseg'):
        pytest.importorskip(f'{library}.engine')
        registry = __import__(f'{library}.registry', fromlist=['registry']).OPTIM_WRAPPER_CONSTRUCTORS
        assert 'LayerDecayOptimWrapperConstructor' not in registry._module_dict
        assert registry.get('LayerDecayOptimWrapperConstructor') is OPTIM_WRAPPER_CONSTRUCTORS.get(
            'LayerDecayOptimWrapperConstructor'
        )


def test_few_groups_and_none_twice():
    wrapper = build(Model(VMamba('test')))
    groups = wrapper.optimizer.param_groups
    # Seven layers, with and without decay, each a group.
    assert len(groups) == len({(group['lr'], group['weight_decay']) for group in groups}) == 14
    parameters = [id(parameter) for group in groups for parameter in group['params']]
    assert len(parameters) == len(set(parameters))


def test_a_shared_parameter_is_taken_once():
    model = Model(VMamba('test'))
    model.again = model.head
    assert sum(name.endswith('head.weight') for name in settings(build(model))) == 1


def test_frozen_stages_are_left_out():
    found = settings(build(Model(VMamba('test', frozen_stages=2))))
    frozen = ('backbone.patch_embed.', 'backbone.stages.0.', 'backbone.stages.1.', 'backbone.norm0.', 'backbone.norm1.')
    assert not any(name.startswith(frozen) for name in found)
    # The others' rates do not depend on what is frozen.
    assert found['backbone.stages.2.blocks.0.norm1.bias'][0] == pytest.approx(LR * RATE**3)


def test_a_configs_own_keys_hold_too():
    found = settings(
        build(
            Model(VMamba('test')),
            norm_decay_mult=0.5,
            bias_decay_mult=1.0,
            custom_keys={
                'head': dict(lr_mult=10.0),
                'mixer': dict(decay_mult=0.1),
                'mixer.D': dict(decay_mult=0.0, lr_mult=2.0),
            },
        )
    )
    assert found['head.weight'] == (pytest.approx(10 * LR), DECAY)
    assert found['head.bias'] == (pytest.approx(10 * LR), DECAY)
    assert found['backbone.norm3.weight'] == (LR, pytest.approx(DECAY / 2))
    last = 'backbone.stages.3.blocks.0.mixer'
    assert found[f'{last}.D'] == (pytest.approx(2 * LR * RATE), 0.0)
    assert found[f'{last}.A_log'] == (pytest.approx(LR * RATE), pytest.approx(DECAY / 10))


def test_an_optimizer_without_weight_decay():
    found = settings(build(Model(VMamba('test')), optimizer=dict(type='SGD', lr=LR)))
    assert {decay for _, decay in found.values()} == {0}


def test_a_step_moves_each_layer_by_its_rate():
    model = Model(VMamba('test'))
    wrapper = build(model, optimizer=dict(type='SGD', lr=LR), constructor='LayerDecayOptimWrapperConstructor')
    assert isinstance(wrapper, OptimWrapper)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    wrapper.step()
    for name, lr in [('backbone.patch_embed.first.conv.weight', LR * RATE**6), ('head.weight', LR)]:
        moved = before[name] - dict(model.named_parameters())[name]
        torch.testing.assert_close(moved, torch.full_like(moved, lr), rtol=1e-2, atol=1e-7)


@pytest.mark.parametrize(
    'name',
    [
        'vmamba/vmamba-tiny_8xb128_in1k',
        'vmamba/mask-rcnn_vmamba-tiny_fpn_1x_coco',
        'vmamba/vmamba-tiny_upernet_8xb2-160k_ade20k-512x512',
        'mamba2d/mamba2d-tiny_upernet_8xb2-160k_ade20k-512x512',
        'mamba2d/mask-rcnn_mamba2d-tiny_fpn_1x_coco',
        'v2m/v2m-tiny_8xb64_in1k',
    ],
)
def test_the_zoos_recipes_take_it(name):
    options = {
        'optim_wrapper.constructor': 'LayerDecayOptimWrapperConstructor',
        'optim_wrapper.paramwise_cfg.layer_decay_rate': RATE,
    }
    cfg = load_config(Path(__file__).resolve().parents[2] / 'configs' / f'{name}.py', options)
    paramwise_cfg = cfg.optim_wrapper.paramwise_cfg.to_dict()
    model = Model(
        V2M('test', cls_token='corner') if 'v2m' in name else Mamba2D('test') if 'mamba2d' in name else VMamba('test')
    )
    found = settings(build(model, dict(cfg.optim_wrapper.optimizer), **paramwise_cfg))
    decay = cfg.optim_wrapper.optimizer.weight_decay
    spared = ('norm', '.A_log', '.dt_bias', 'mixer.D', 'pos_embed', 'cls_token')
    assert all(settings == 0.0 for name, (_, settings) in found.items() if any(part in name for part in spared))
    assert found['head.weight'] == (cfg.optim_wrapper.optimizer.lr, decay)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(layer_decay_rate=None), 'needs layer_decay_rate, above 0 and at most 1, got None'),
        (dict(layer_decay_rate=1.5), 'got 1.5'),
        (dict(layer_decay_rate=0), 'got 0'),
        (dict(layer_decay_rate='0.9'), "got '0.9'"),
        (dict(dwconv_decay_mult=0.0), 'has no dwconv_decay_mult; it takes layer_decay_rate, '),
        (dict(custom_keys={'head': dict(lr=1.0)}), "custom_keys take lr_mult and decay_mult, got 'head'"),
        (dict(optimizer=dict(type='AdamW')), 'set lr in the optimizer'),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build(Model(VMamba('test')), **options)


@pytest.mark.parametrize(
    ('model', 'message'),
    [
        (lambda: nn.Linear(2, 2), 'a Linear with layer-wise .* found: none'),
        (lambda: Model(nn.Linear(2, 2)), 'needs exactly one backbone that has get_layer_depth.* found: none'),
        (lambda: nn.ModuleDict({'a': VMamba('test'), 'b': VMamba('test')}), 'found: a, b'),
    ],
)
def test_models_without_a_backbone_are_refused(model, message):
    with pytest.raises(ValueError, match=message):
        build(model())


def groups_of(wrapper, model):
    """The options of each parameter's group that an optimizer reads."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]: options(group)
        for group in wrapper.optimizer.param_groups
        for parameter in group['params']
    }


def options(group):
    return {key: value for key, value in group.items() if key not in ('params', 'param_names', 'lr_mult', 'decay_mult')}


GROUPED = dict(
    constructor='GroupedOptimWrapperConstructor',
    layer_decay_rate=None,
    norm_decay_mult=0.0,
    flat_decay_mult=0.5,
    custom_keys={'.A_log': dict(decay_mult=0.0), 'norm2': {}, 'head': dict(lr_mult=2.0, betas=[0.5, 0.9])},
)


@pytest.mark.parametrize('family', BACKBONES)
def test_equal_options_share_a_group_and_every_parameter_keeps_its_own(family):
    model = Model(BACKBONES[family]())
    model.backbone.patch_embed.requires_grad_(False)
    each = build(model, **GROUPED | dict(constructor='DefaultOptimWrapperConstructor'))
    few = build(model, **GROUPED)
    assert groups_of(few, model) == groups_of(each, model)
    found = [options(group) for group in few.optimizer.param_groups]
    assert all(found.count(one) == 1 for one in found)
    assert len(found) == 4 < 20 < len(each.optimizer.param_groups)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in few.optimizer.param_groups:
        assert group['param_names'] == [names[id(parameter)] for parameter in group['params']]


def test_a_parameter_that_is_there_twice_is_refused_or_taken_once():
    model = Model(VMamba('test'))
    model.tail = nn.Conv2d(4, 4, 3)
    model.tail.weight = model.head.weight
    with pytest.raises(ValueError, match=r'of shape \(4, 4, 3, 3\) is in the Model twice; bypass_duplicate=True in'):
        build(model, **GROUPED)
    wrapper = build(model, **GROUPED, bypass_duplicate=True)
    members = [id(parameter) for group in wrapper.optimizer.param_groups for parameter in group['params']]
    assert len(members) == len(set(members)) == len(list(model.parameters()))


@pytest.mark.parametrize('optimizer', [dict(foreach=True), dict(foreach=False)])
def test_shared_groups_learn_what_single_ones_do(optimizer):
    results = []
    for constructor in ('DefaultOptimWrapperConstructor', 'GroupedOptimWrapperConstructor'):
        torch.manual_seed(0)
        model = Model(VMamba('test'))
        settings = dict(type='AdamW', lr=LR, weight_decay=DECAY, **optimizer)
        wrapper = build(model, settings, **GROUPED | dict(constructor=constructor))
        for _ in range(3):
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter)
            wrapper.step()
        results.append(model.state_dict())
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=0, atol=0, msg=name)


def test_without_options_all_parameters_are_one_group():
    model = Model(VMamba('test'))
    wrapper = build(model, constructor='GroupedOptimWrapperConstructor', layer_decay_rate=None)
    assert [len(group['params']) for group in wrapper.optimizer.param_groups] == [len(list(model.parameters()))]
