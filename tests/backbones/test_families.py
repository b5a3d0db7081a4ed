"""What every family's backbones do alike, shown on a small model of each."""

import copy
import math

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS

from ssm_backbones import V2M, Mamba2D, VMamba
from tests.versions import needs_float16, since_torch_2_4

SMALL = {
    'vmamba': (VMamba, 'test'),
    'vmamba-v0': (VMamba, dict(embed_dims=16, depths=[1, 1, 2, 1], d_state=4, ssm_ratio=2.0, version='v0')),
    'v2m-plain': (V2M, 'test'),
    'v2m-hier': (V2M, 'test-hier'),
    'mamba2d': (Mamba2D, 'test'),
    'mamba2d-mixed': (
        Mamba2D,
        dict(
            embed_dims=[32, 32, 64, 64],
            depths=[2, 1, 1, 1],
            d_state=4,
            mixers=['scan', 'attention', 'scan', 'attention'],
        ),
    ),
}
ONE_OF_EACH = ['vmamba', 'vmamba-v0', 'v2m-plain', 'v2m-hier', 'mamba2d']
SIZES = [(1, 1), (1, 50), (64, 1), (5, 7), (31, 33), (37, 61)]
ORDERS = [(0,), (2,), (0, 3), (3, 0), (-2, 1), (2, 0, 3, 1)]
VMAMBA_ARCH = dict(embed_dims=16, depths=[1, 1], d_state=2, ssm_ratio=1.0, version='v2')
MAMBA2D_ARCH = dict(embed_dims=[16, 32], depths=[2, 1], d_state=2, mixers=['scan', 'attention'])
PLAIN_ARCH = dict(layout='plain', embed_dims=16, depth=2, d_state=2)
HIERARCHICAL_ARCH = dict(layout='hierarchical', embed_dims=16, depths=[1, 1], d_state=2, ssm_ratio=1.0)


def build(name, **options):
    family, arch = SMALL[name]
    return family(arch, **options)


def each(cases):
    """The pairs of a name and one of its cases."""
    return [pytest.param(name, case, id=f'{name}-{case}') for name, of_name in cases.items() for case in of_name]


def map_shape(name, index, size):
    """The shape (C, H, W) of one of the maps of an image of this size."""
    if name == 'v2m-plain':
        return 16, *(math.ceil(s / 16) for s in size)
    if name == 'mamba2d-mixed':
        stem = [max((s + 1) // 4, 1) for s in size]
        return (32, 32, 64, 64)[index], *(math.ceil(s / 2**index) for s in stem)
    return 16 * 2**index, *(math.ceil(s / (4 * 2**index)) for s in size)


@pytest.mark.parametrize(
    ('name', 'options'),
    [
        *((name, dict(out_indices=(2, 0))) for name in SMALL),
        ('v2m-plain', dict(pyramid='single')),
        ('v2m-plain', dict(pyramid='multi')),
        ('v2m-plain', dict(cls_token='center')),
    ],
)
def test_strides_and_names_tell_what_the_maps_are(name, options):
    model = build(name, **options)
    with torch.no_grad():
        made = {}
        for index, module in model.output_modules.items():
            model.get_submodule(module).register_forward_hook(
                lambda module, inputs, output, index=index: made.update({index: output.shape[2:]})
            )
        maps = model(torch.randn(1, 3, 96, 64))
    assert [(96 // stride, 64 // stride) for stride in model.strides] == [m.shape[2:] for m in maps]
    assert list(made) == sorted(model.output_modules)
    assert [made[index] for index in model.output_modules] == [m.shape[2:] for m in maps]
    plain = name == 'v2m-plain'
    assert model.stage_strides == tuple(16 if plain else 4 * 2**i for i in range(len(model.stages)))
    assert model.stage_names == tuple(f'{"block" if plain else "stage"} {i}' for i in range(len(model.stages)))


@pytest.mark.parametrize(
    ('name', 'size'),
    each(
        {
            'vmamba': [*SIZES, (4, 4), (2, 3)],
            'vmamba-v0': [*SIZES, (4, 4), (2, 3)],
            'v2m-plain': SIZES,
            'v2m-hier': SIZES,
            'mamba2d-mixed': [*SIZES, (2, 50), (3, 4)],
        }
    ),
)
def test_any_size_works(name, size):
    out_indices = (3, 0) if name == 'v2m-plain' else (3, 0, 2, 1)
    model = build(name, out_indices=out_indices)
    maps = model(torch.randn(1, 3, *size))
    for i, m in zip(out_indices, maps, strict=True):
        assert m.shape == (1, *map_shape(name, i, size))
        assert torch.isfinite(m).all()
        assert m.is_contiguous()
    sum((m * torch.randn_like(m)).sum() for m in maps).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize(
    ('name', 'out_indices'),
    each(
        {
            'vmamba': ORDERS,
            'mamba2d': ORDERS,
            'v2m-plain': [(0,), (3, 1), (-2, 0, 3)],
            'v2m-hier': [(2,), (3, 0), (2, 0, 3, 1)],
        }
    ),
)
def test_out_indices_choose_and_order_the_maps(name, out_indices):
    whole = build(name, out_indices=(0, 1, 2, 3)).eval()
    part = build(name, out_indices=out_indices).eval()
    part.load_state_dict({key: whole.state_dict()[key] for key in part.state_dict()})
    x = torch.randn(1, 3, 32, 48)
    maps = whole(x)
    assert isinstance(part(x), tuple)
    assert all(torch.equal(m, maps[i]) for m, i in zip(part(x), out_indices, strict=True))


@pytest.mark.parametrize(
    ('name', 'options'),
    each(
        {name: [dict(), dict(out_indices=3), dict(out_indices=1)] for name in ('vmamba', 'vmamba-v0', 'mamba2d')}
        | {
            'v2m-plain': [
                dict(),
                dict(out_indices=(1, 3)),
                dict(pyramid='single'),
                dict(pyramid='multi'),
                dict(cls_token='corner'),
                dict(cls_token='center', pyramid='multi'),
                dict(out_type='cls_token'),
                dict(cls_token='corner', out_type='cls_token'),
                dict(cls_token='center', out_type='cls_token'),
            ],
            'v2m-hier': [dict(), dict(out_indices=(1,))],
        }
    ),
)
def test_gradients_reach_every_parameter(name, options):
    model = build(name, **options)
    sum((m * torch.randn_like(m)).sum() for m in model(torch.randn(2, 3, 72, 56))).backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, parameter_name


@pytest.mark.parametrize('name', ['vmamba', 'vmamba-v0', 'v2m-plain', 'v2m-hier', 'mamba2d-mixed'])
def test_samples_of_a_batch_do_not_touch_each_other(name):
    model = build(name).eval()
    x = torch.randn(3, 3, 36, 28)
    order = torch.tensor([2, 0, 1])
    for m, p in zip(model(x), model(x[order]), strict=True):
        torch.testing.assert_close(p, m[order])
    torch.testing.assert_close(model(x[1:2])[-1], model(x)[-1][1:2])
    assert [m.shape[0] for m in model(x[:0])] == [0] * len(model.out_indices)


@pytest.mark.parametrize(
    ('name', 'size'), [('vmamba', (48, 32)), ('mamba2d', (48, 32)), ('v2m-plain', (96, 64)), ('v2m-hier', (96, 64))]
)
def test_checkpointing_changes_memory_and_nothing_else(name, size):
    x = torch.randn(2, 3, *size)
    results = []
    for with_cp in (False, True):
        torch.manual_seed(5)
        model = build(name, with_cp=with_cp, drop_path_rate=0.5)
        saved = {}

        def note(tensor, saved=saved):
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            maps = model(x)
        held = sum(saved.values()) - sum(p.untyped_storage().nbytes() for p in model.parameters())
        sum(m.square().sum() for m in maps).backward()
        results.append((held, maps, [p.grad for p in model.parameters()]))
    assert results[1][0] < 0.5 * results[0][0]
    torch.testing.assert_close(results[0][1:], results[1][1:])


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ('name', 'options'),
    each(
        {
            'vmamba': [dict()],
            'vmamba-v0': [dict()],
            'mamba2d-mixed': [dict()],
            'v2m-plain': [dict(cls_token='center'), dict(pyramid='single')],
            'v2m-hier': [dict()],
        }
    ),
)
def test_autocast(name, options, dtype):
    needs_float16(dtype)
    model = build(name, **options)
    x = torch.randn(2, 3, 48, 32)
    expected = model(x)
    with torch.autocast('cpu', dtype):
        maps = model(x)
        loss = sum(m.float().square().mean() for m in maps)
    loss.backward()
    for m, e in zip(maps, expected, strict=True):
        # Every output passes a norm, so its deviation is 1 and the error is relative.
        assert (m.float() - e).square().mean().sqrt() < (0.1 if dtype == torch.bfloat16 else 0.02)
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad.dtype == torch.float32, parameter_name
        assert torch.isfinite(parameter.grad).all(), parameter_name


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    ('name', 'options'),
    each(
        {
            'vmamba': [dict(out_indices=3)],
            'mamba2d': [dict(out_indices=3)],
            'v2m-plain': [dict(cls_token='corner'), dict(pyramid='multi')],
            'v2m-hier': [dict(out_indices=3)],
        }
    ),
)
def test_whole_models_of_other_dtypes(name, options, dtype):
    needs_float16(dtype)
    model = build(name, **options)
    x = torch.randn(1, 3, 64, 48)
    expected = model(x)[0]
    output = model.to(dtype)(x.to(dtype))[0]
    assert output.dtype == dtype
    assert (output.float() - expected).square().mean().sqrt() < 0.1


@since_torch_2_4
@pytest.mark.parametrize(
    ('family', 'arch', 'options', 'sizes'),
    [
        (VMamba, VMAMBA_ARCH, dict(out_indices=(0, 1), with_cp=True), [(40, 32)]),
        (Mamba2D, MAMBA2D_ARCH, dict(out_indices=(0, 1), with_cp=True), [(40, 32)]),
        (V2M, HIERARCHICAL_ARCH, dict(out_indices=(0, 1), with_cp=True), [(40, 32)]),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (VMamba, VMAMBA_ARCH, dict(out_indices=(0, 1)), [(40, 32), (33, 47)]),
                (VMamba, dict(VMAMBA_ARCH, version='v0'), dict(out_indices=(0, 1)), [(33, 47)]),
                (Mamba2D, dict(MAMBA2D_ARCH, depths=[1, 1]), dict(out_indices=(0, 1)), [(40, 32), (33, 47)]),
                (V2M, dict(PLAIN_ARCH, depth=1), dict(), [(40, 32), (33, 80)]),
                (V2M, dict(PLAIN_ARCH, depth=1), dict(pyramid='single', cls_token='center'), [(40, 32)]),
            )
        ),
    ],
)
def test_compiles_without_graph_breaks(family, arch, options, sizes):
    torch.compiler.reset()
    model = family(arch, **options)
    compiled = torch.compile(model, fullgraph=True, dynamic=len(sizes) > 1, backend='aot_eager')
    for size in sizes:
        x = torch.randn(2, 3, *size)
        gradients = []
        for function in (model, compiled):
            model.zero_grad()
            maps = function(x)
            sum(m.square().sum() for m in maps).backward()
            gradients.append((maps, [p.grad for p in model.parameters()]))
        torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('frozen_stages', [-1, 0, 1, 2, 3, 4])
@pytest.mark.parametrize(
    ('name', 'options'),
    [
        ('vmamba', dict(drop_path_rate=0.5)),
        ('mamba2d', dict(drop_path_rate=0.5)),
        ('v2m-plain', dict(cls_token='corner', out_indices=(1, 3))),
    ],
)
def test_frozen_stages_do_not_train(name, options, frozen_stages):
    model = build(name, frozen_stages=frozen_stages, **options).train()
    frozen = ['patch_embed.'] if frozen_stages >= 0 else []
    frozen += [f'{part}{i}.' for i in range(frozen_stages) for part in ('stages.', 'norm')]
    for part, parameter in model.named_parameters():
        assert parameter.requires_grad != part.startswith(tuple(frozen)), part
        assert not (parameter.requires_grad and frozen_stages == 4), part
    for part, module in model.named_modules():
        if part:
            assert module.training != f'{part}.'.startswith(tuple(frozen)), part
    maps = model(torch.randn(2, 3, 32, 32))
    assert [m.requires_grad for m in maps] == [i >= frozen_stages for i in model.out_indices]
    model.eval()
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize('name', ONE_OF_EACH)
def test_models_follow_the_seed_and_init_weights_changes_nothing(name):
    states = []
    for _ in range(2):
        torch.manual_seed(4)
        model = build(name)
        states.append(copy.deepcopy(model.state_dict()))
        model.init_weights()
        states.append(model.state_dict())
    assert all(torch.equal(states[0][key], state[key]) for state in states[1:] for key in states[0])


@pytest.mark.parametrize('name', ONE_OF_EACH)
def test_init_cfg_loads_a_checkpoint(name, tmp_path):
    family, arch = SMALL[name]
    source = family(arch)
    path = tmp_path / 'model.pth'
    torch.save(dict(state_dict={f'backbone.{key}': t for key, t in source.state_dict().items()}), path)
    model = MODELS.build(
        dict(
            type=family.__name__, arch=arch, init_cfg=dict(type='Pretrained', checkpoint=str(path), prefix='backbone.')
        )
    )
    assert not all(torch.equal(t, source.state_dict()[key]) for key, t in model.state_dict().items())
    model.init_weights()
    assert all(torch.equal(t, source.state_dict()[key]) for key, t in model.state_dict().items())


@pytest.mark.parametrize(
    ('family', 'options', 'size', 'shapes'),
    [
        (
            VMamba,
            dict(arch=dict(VMAMBA_ARCH, embed_dims=8, depths=[1, 2], ssm_ratio=2.0), out_indices=[0, 1]),
            (16, 16),
            [(1, 8, 4, 4), (1, 16, 2, 2)],
        ),
        (
            Mamba2D,
            dict(arch=dict(embed_dims=[8, 12], depths=[1, 2], d_state=2, mixers=['scan', 'scan']), out_indices=[0, 1]),
            (16, 16),
            [(1, 8, 4, 4), (1, 12, 2, 2)],
        ),
        (V2M, dict(arch=PLAIN_ARCH, img_size=(32, 48)), (32, 16), [(1, 16, 2, 1)]),
        (V2M, dict(arch=HIERARCHICAL_ARCH, out_indices=[1, 0]), (16, 16), [(1, 32, 2, 2), (1, 16, 4, 4)]),
    ],
)
@pytest.mark.parametrize('scope', ['mmpretrain', 'mmdet', 'mmseg'])
def test_every_host_library_builds_it_by_its_type(scope, family, options, size, shapes):
    registry = __import__(f'{scope}.registry', fromlist=['MODELS']).MODELS
    config = Config(dict(model=dict(type=family.__name__, in_channels=1, **options)))
    model = registry.build(config.model)
    assert isinstance(model, family)
    assert [m.shape for m in model(torch.randn(1, 1, *size))] == shapes


@pytest.mark.parametrize('name', ONE_OF_EACH)
def test_wrong_images_are_refused(name):
    model = build(name, in_channels=4)
    family = SMALL[name][0].__name__
    for shape in ((4, 8, 8), (1, 3, 8, 8), (1, 4, 8, 8, 1)):
        with pytest.raises(ValueError, match=rf'{family} takes images of shape \(B, 4, H, W\), got \({shape[0]}, '):
            model(torch.zeros(shape))
    with pytest.raises(ValueError, match='at least 1x1 pixels'):
        model(torch.zeros(1, 4, 0, 8))
    with pytest.raises(TypeError, match='torch.uint8'):
        model(torch.zeros(1, 4, 8, 8, dtype=torch.uint8))
    with pytest.raises(TypeError, match='got list'):
        model([torch.zeros(1, 4, 8, 8)])
