"""VMamba: the published variants, its mixer against loops, and everything its constructor offers."""

import copy
import hashlib
import json

import pytest
import torch
from mmengine.registry import MODELS
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from ssm_backbones import VMamba
from ssm_backbones.layers.ss2d import SS2D

# Of the official checkpoints: parameters with the classification head, tensors, the first 16 digits of the SHA-256 of
# the sorted list of all tensors' shapes (as JSON), and the published FLOPs in G.
PUBLISHED = {
    'tiny-s1l8': (30249064, 276, '9a38677b7c197c30', 4.91),
    'tiny-s2l5': (30705832, 222, '49c9dc1e371ee68d', 4.86),
    'small-s2l15': (50147752, 402, '2c1fb94a3bdce3de', 8.72),
    'small-s1l20': (49012840, 492, 'cc2beb47a2dea52a', 8.61),
    'base-s2l15': (88557800, 402, '2baa7980082bbc30', 15.36),
    'base-s1l20': (86614504, 492, '0d731c050054147d', 15.22),
    'tiny-v0': (22893448, 212, '3c200ca7f92fdbed', 5.63),
    'small-v0': (44417416, 446, '00bb3927e387f65b', 11.23),
    'base-v0': (76254056, 446, '437766c555118e28', 18.02),
}


def meta_classifier(arch):
    """The backbone in mmpretrain's classifier, without memory."""
    from mmpretrain.registry import MODELS as CLASSIFIERS

    width = VMamba.ARCHS[VMamba.ALIASES.get(arch, arch)]['embed_dims'] * 8
    with torch.device('meta'):
        return CLASSIFIERS.build(
            dict(
                type='mmpretrain.ImageClassifier',
                backbone=dict(type='VMamba', arch=arch, out_indices=(3,)),
                neck=dict(type='mmpretrain.GlobalAveragePooling'),
                head=dict(type='mmpretrain.LinearClsHead', num_classes=1000, in_channels=width),
            )
        )


def official_shape(name, tensor, version):
    """The shape that the official checkpoints give a tensor of ours."""
    shape = list(tensor.shape)
    if name.endswith('.A_log') or (name.endswith('.dt_weight') and version == 'v2'):
        return [4 * shape[1], shape[2]]
    if name.endswith('.D'):
        return [4 * shape[1]]
    if name.endswith('.x_proj.weight') and version == 'v0':
        return [4, shape[0] // 4, shape[1]]
    return shape


@pytest.mark.parametrize('arch', PUBLISHED)
def test_variants_have_the_official_tensors(arch):
    parameters, tensors, digest, _ = PUBLISHED[arch]
    state = meta_classifier(arch).state_dict()
    assert sum(tensor.numel() for tensor in state.values()) == parameters
    version = VMamba.ARCHS[arch]['version']
    shapes = sorted(official_shape(name, tensor, version) for name, tensor in state.items())
    assert len(shapes) == tensors
    assert hashlib.sha256(json.dumps(shapes).encode()).hexdigest()[:16] == digest


@pytest.mark.parametrize('arch', PUBLISHED)
def test_variants_have_the_published_flops(arch):
    model = meta_classifier(arch).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, 224, 224, device='meta'))
    # PyTorch counts a multiply-add as two. The published figures count the norms too, less than 1.2 %.
    flops = counter.get_total_flops() / 2e9
    assert 0.988 * PUBLISHED[arch][3] < flops < PUBLISHED[arch][3]


def test_short_names_stand_for_the_published_defaults():
    for short, arch in [('tiny', 'tiny-s1l8'), ('small', 'small-s2l15'), ('base', 'base-s2l15')]:
        parameters = sum(parameter.numel() for parameter in meta_classifier(short).parameters())
        assert parameters == PUBLISHED[arch][0], short


def ss2d_by_loops(layer, x):
    """SS2D written from its equations: each route walked pixel by pixel. x (B, H, W, C)."""
    batch, height, width, _ = x.shape
    inner, rank, states = layer.D.shape[1], layer.dt_rank, layer.d_state
    u = x @ layer.in_proj.weight.t()
    u, z = (u[..., :inner], u[..., inner:]) if layer.gate else (u, None)
    padded = F.pad(u, (0, 0, 1, 1, 1, 1))
    u = sum(
        padded[:, i : i + height, j : j + width] * layer.conv.weight[:, 0, i, j] for i in range(3) for j in range(3)
    )
    if layer.conv.bias is not None:
        u = u + layer.conv.bias
    u = u * torch.sigmoid(u)

    rows = [(i, j) for i in range(height) for j in range(width)]
    columns = [(i, j) for j in range(width) for i in range(height)]
    pixels = {(i, j): 0 for i, j in rows}
    for k, route in enumerate([rows, columns, rows[::-1], columns[::-1]]):
        weight = layer.x_proj.weight[k * (rank + 2 * states) : (k + 1) * (rank + 2 * states)]
        A = -torch.exp(layer.A_log[k])
        h = x.new_zeros(batch, inner, states)
        for i, j in route:
            v = u[:, i, j]
            step, B, C = (v @ weight.t()).split([rank, states, states], dim=1)
            d = torch.log1p(torch.exp(step @ layer.dt_weight[k].t() + layer.dt_bias[k]))
            h = torch.exp(d[:, :, None] * A) * h + (d * v)[:, :, None] * B[:, None, :]
            pixels[i, j] = pixels[i, j] + (h * C[:, None, :]).sum(2) + layer.D[k] * v
    y = torch.stack([pixels[i, j] for i, j in rows], dim=1).view(batch, height, width, inner)
    y = (y - y.mean(-1, keepdim=True)) / torch.sqrt(y.var(-1, unbiased=False, keepdim=True) + 1e-5)
    y = y * layer.norm.weight + layer.norm.bias
    if z is not None:
        y = y * z * torch.sigmoid(z)
    return y @ layer.out_proj.weight.t()


def random_ss2d(d_state, gate, dtype=torch.float64):
    layer = SS2D(5, inner_channels=8, d_state=d_state, dt_rank=2, gate=gate, conv_bias=gate).to(dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


@pytest.mark.parametrize(('d_state', 'gate'), [(1, False), (3, False), (4, True)])
@pytest.mark.parametrize('size', [(3, 5), (4, 1), (1, 1)])
def test_ss2d_equals_loops_over_the_routes(d_state, gate, size):
    layer = random_ss2d(d_state, gate)
    x = torch.randn(2, *size, 5, dtype=torch.float64, requires_grad=True)
    inputs = [x, *layer.parameters()]
    y, expected = layer(x), ss2d_by_loops(layer, x)
    torch.testing.assert_close(y, expected)
    weights = torch.randn_like(y)
    for ours, theirs in zip(
        torch.autograd.grad(y, inputs, weights), torch.autograd.grad(expected, inputs, weights), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_ss2d_equals_loops_in_float32():
    layer = random_ss2d(1, False, torch.float32)
    x = torch.randn(2, 4, 6, 5)
    torch.testing.assert_close(layer(x), ss2d_by_loops(layer, x), rtol=1e-4, atol=1e-5)


def permuted_routes(state, order):
    """A VMamba's state with the four routes' parameters in another order."""
    permuted = {}
    for name, tensor in state.items():
        if name.rpartition('.')[2] in ('A_log', 'D', 'dt_weight', 'dt_bias'):
            tensor = tensor[order]
        elif name.endswith('x_proj.weight'):
            tensor = tensor.view(4, -1, tensor.shape[1])[order].flatten(0, 1)
        permuted[name] = tensor
    return permuted


def test_a_transposed_image_gives_transposed_maps_once_rows_and_columns_are_swapped():
    model = VMamba('test').double()
    twin = copy.deepcopy(model)
    state = permuted_routes(model.state_dict(), [1, 0, 3, 2])
    twin.load_state_dict({name: t.transpose(2, 3) if t.ndim == 4 else t for name, t in state.items()})
    x = torch.randn(1, 3, 44, 70, dtype=torch.float64)
    for m, t in zip(model(x), twin(x.transpose(2, 3)), strict=True):
        torch.testing.assert_close(t.transpose(2, 3), m)
    assert not torch.allclose(model(x.transpose(2, 3))[0].transpose(2, 3), model(x)[0])


def test_an_image_turned_upside_down_gives_turned_maps_once_the_routes_are_reversed():
    layer = random_ss2d(2, True)
    twin = copy.deepcopy(layer)
    state = permuted_routes(layer.state_dict(), [2, 3, 0, 1])
    twin.load_state_dict({name: t.flip(2, 3) if t.ndim == 4 else t for name, t in state.items()})
    x = torch.randn(1, 4, 3, 5, dtype=torch.float64)
    torch.testing.assert_close(twin(x.flip(1, 2)).flip(1, 2), layer(x))


@pytest.mark.parametrize(
    ('change', 'error', 'message'),
    [
        (dict(version='v1'), ValueError, "version is 'v2' or 'v0' .*, got 'v1'"),
        (dict(embed_dims=15), ValueError, 'must be even, got 15'),
        (dict(embed_dims=0), ValueError, 'embed_dims must be at least 2, got 0'),
        (dict(depths=[2, 0]), ValueError, 'depths must be at least 1, got 0'),
        (dict(depths=[]), TypeError, r'non-empty sequence of integers, got \[\]'),
        (dict(depths=4), TypeError, 'got 4'),
        (dict(d_state=0), ValueError, 'd_state must be at least 1, got 0'),
        (dict(d_state=1.5), TypeError, 'got 1.5'),
        (dict(ssm_ratio=0), ValueError, 'ssm_ratio must be positive .* got 0 of 16'),
        (dict(ssm_ratio=0.3), ValueError, 'whole number of channels, got 0.3 of 16'),
        (dict(mlp_ratio=4), ValueError, "VMamba's arch dict has unknown mlp_ratio; its keys are embed_dims, depths"),
    ],
)
def test_wrong_arch_dicts_are_refused(change, error, message):
    arch = dict(embed_dims=16, depths=[1, 1], d_state=1, ssm_ratio=1.0, version='v2')
    VMamba(arch, out_indices=0)
    with pytest.raises(error, match=message):
        VMamba({**arch, **change}, out_indices=0)


def test_unknown_names_and_missing_keys_are_refused():
    with pytest.raises(ValueError, match=r"VMamba has no arch 'tiny-v1' \(did you mean 'tiny-v0'\?\)"):
        VMamba('tiny-v1')
    with pytest.raises(ValueError, match="VMamba's arch dict lacks depths, d_state"):
        VMamba(dict(embed_dims=16, ssm_ratio=1.0, version='v2'))
    with pytest.raises(ValueError, match='tiny-v1'):
        MODELS.build(dict(type='VMamba', arch='tiny-v1'))
