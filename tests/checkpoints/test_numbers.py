"""A converted model computes what the official tensors mean, by an oracle that knows the official names alone."""

import itertools
import re

import pytest
import torch
from mmpretrain.registry import MODELS as CLASSIFIERS

import ssm_backbones.heads  # noqa: F401
from ssm_backbones import Mamba2D, VMamba
from ssm_backbones.checkpoints import convert_checkpoint, restore_checkpoint
from tests.checkpoints import official_mamba2d, official_vmamba
from tests.checkpoints.layouts import (
    mamba2d_backbone,
    mamba2d_classifier,
    random_tensors,
    vmamba_classifier,
    vmamba_pyramid,
)

SMALL_VMAMBA = {
    'v2': dict(embed_dims=8, depths=[1, 2, 1, 1], ssm_ratio=2.0, d_state=2),
    'v2-narrow': dict(embed_dims=32, depths=[1, 1, 1, 2], ssm_ratio=1.0, d_state=1),
    'v0': dict(embed_dims=8, depths=[1, 2, 1, 1], ssm_ratio=2.0, d_state=3, version='v0'),
}
SMALL_MAMBA2D = dict(embed_dims=[16, 24, 32, 64], depths=[2, 1, 2, 1], d_state=3)


def tensors_of(layout):
    """Random tensors of float64 at which no activation vanishes or explodes, all of them different."""
    tensors = random_tensors(layout, torch.float64)
    for name, tensor in tensors.items():
        if name.endswith(('A_logs', 'AT_log', 'AL_log')):
            tensor.mul_(0.3)
        elif tensor.ndim > 1:
            tensor.mul_(tensor[0].numel() ** -0.5)
        elif name.endswith('weight'):
            tensor.mul_(0.2).add_(1.0)
    return tensors


def spelled_flat(tensors):
    """v2 with the projections of the routes in one dimension, as the authors' single-file code of 2025 names them."""
    spelled = {}
    for name, tensor in tensors.items():
        if name.endswith(('x_proj_weight', 'dt_projs_weight')):
            name, tensor = name.replace('_weight', '.weight'), tensor.flatten(0, 1)
        spelled[name] = tensor
    return spelled


def spelled_first(tensors):
    """v0 as the code that trained it named things."""
    changes = [
        ('patch_embed.0', 'patch_embed.proj'),
        ('patch_embed.2', 'patch_embed.norm'),
        ('.op.', '.self_attention.'),
        ('downsample.1', 'downsample.norm'),
        ('downsample.2', 'downsample.reduction'),
        ('classifier.norm', 'norm'),
        ('classifier.head', 'head'),
    ]
    spelled = {}
    for name, tensor in tensors.items():
        if '.blocks.' in name:
            name = name.replace('.norm.', '.ln_1.')
        for old, new in changes:
            name = name.replace(old, new)
        spelled[name] = tensor
    return spelled


@pytest.mark.parametrize(
    ('variant', 'spelling'),
    [('v2', None), ('v2-narrow', None), ('v0', None), ('v2', spelled_flat), ('v0', spelled_first)],
)
def test_vmamba_classifiers(variant, spelling):
    options = SMALL_VMAMBA[variant]
    tensors = tensors_of(vmamba_classifier(**options, num_classes=5))
    converted, report = convert_checkpoint({'model': spelling(tensors) if spelling else tensors})
    assert report.kind == 'classifier'
    arch = {'version': 'v2', **options}
    model = CLASSIFIERS.build(
        dict(
            type='mmpretrain.ImageClassifier',
            backbone=dict(type='VMamba', arch=arch, out_indices=(3,)),
            neck=dict(type='mmpretrain.GlobalAveragePooling'),
            head=dict(type='mmpretrain.LinearClsHead', num_classes=5, in_channels=8 * options['embed_dims']),
        )
    )
    model.double().eval()
    model.load_state_dict(converted['state_dict'], strict=True)
    images = torch.randn(2, 3, 64, 32, dtype=torch.float64)
    with torch.no_grad():
        logits = model.head.fc(model.neck(model.backbone(images))[0])
        torch.testing.assert_close(logits, official_vmamba.classify(tensors, images), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ('variant', 'spelling'), [('v2', None), ('v0', None), ('v2', spelled_flat), ('v0', spelled_first)]
)
def test_vmamba_pyramids(variant, spelling):
    options = SMALL_VMAMBA[variant]
    tensors = tensors_of(vmamba_pyramid(**options))
    spelled = spelling(tensors) if spelling else tensors
    whole = {'backbone.' + name: tensor for name, tensor in spelled.items()} | {'neck.weight': torch.ones(3)}
    converted, _ = convert_checkpoint({'state_dict': whole}, backbone_only=True)
    model = VMamba({'version': 'v2', **options}).double().eval()
    model.load_state_dict(converted['state_dict'], strict=True)
    images = torch.randn(1, 3, 32, 64, dtype=torch.float64)
    with torch.no_grad():
        expected = [
            official_vmamba.norm(tensors, f'outnorm{i}', x)
            for i, x in enumerate(official_vmamba.forward(tensors, images))
        ]
        for result, correct in zip(model(images), expected, strict=True):
            torch.testing.assert_close(result, correct, rtol=1e-9, atol=1e-9)
    back, _ = restore_checkpoint(convert_checkpoint({'state_dict': whole})[0])
    assert back['state_dict'].keys() == whole.keys()
    assert all(torch.equal(back['state_dict'][name], tensor) for name, tensor in whole.items())


def test_mamba2d_classifiers():
    tensors = tensors_of(mamba2d_classifier(**SMALL_MAMBA2D, num_classes=5))
    converted, report = convert_checkpoint({'state_dict': tensors})
    assert report.kind == 'classifier'
    model = (
        CLASSIFIERS.build(
            dict(
                type='mmpretrain.ImageClassifier',
                backbone=dict(type='Mamba2D', arch=SMALL_MAMBA2D, out_indices=(3,)),
                head=dict(type='Mamba2DClsHead', num_classes=5, in_channels=64),
            )
        )
        .double()
        .eval()
    )
    model.load_state_dict(converted['state_dict'], strict=True)
    images = torch.randn(2, 3, 64, 32, dtype=torch.float64)
    with torch.no_grad():
        logits = model.head(model.backbone(images))
        # Ours computes the angles of the positions in float32.
        torch.testing.assert_close(logits, official_mamba2d.classify(tensors, images), rtol=1e-5, atol=1e-5)


def test_mamba2d_pyramids():
    tensors = tensors_of(mamba2d_backbone(**SMALL_MAMBA2D))
    whole = {'backbone.' + name: tensor for name, tensor in tensors.items()} | {'neck.weight': torch.ones(3)}
    converted, report = convert_checkpoint({'state_dict': whole}, backbone_only=True)
    assert report.kind == 'whole model'
    model = Mamba2D(SMALL_MAMBA2D).double().eval()
    model.load_state_dict(converted['state_dict'], strict=True)
    images = torch.randn(1, 3, 36, 60, dtype=torch.float64)
    with torch.no_grad():
        for result, correct in zip(model(images), official_mamba2d.forward(tensors, images), strict=True):
            torch.testing.assert_close(result, correct, rtol=1e-5, atol=1e-5)


def unit(name):
    """The block, stem, downsampling or output norm that a tensor of ours is of."""
    return re.match(r'stages\.\d+\.blocks\.\d+|stages\.\d+|patch_embed|norm\d+', name)[0]


def exchanged(tensors):
    """Every exchange of two tensors of one shape in one unit, and of neighbouring parts of one that holds several."""
    for one, other in itertools.combinations(tensors, 2):
        if unit(one) == unit(other) and tensors[one].shape == tensors[other].shape:
            yield f'{one} and {other}', {one: tensors[other], other: tensors[one]}
    for name, tensor in tensors.items():
        part = re.search(r'mixer\.(dt_weight|dt_bias|A_log|x_proj|in_proj|qkv)(\.weight)?$', name)
        if part is None:
            continue
        # D is summed over the routes, so that its routes have no order.
        count = dict(in_proj=tensor.shape[0] // tensor.shape[-1], qkv=3).get(part[1], 4)
        if count > 1 and tensor.shape[0] % count == 0:
            parts = tensor.unflatten(0, (count, -1))
            for i in range(count - 1):
                order = [*range(i), i + 1, i, *range(i + 2, count)]
                yield f'parts {i} and {i + 1} of {name}', {name: parts[order].flatten(0, 1)}


@pytest.mark.parametrize('variant', ['v2', 'v0', 'mamba2d'])
def test_exchanged_tensors_are_noticed(variant):
    """The comparisons above are sharp: tensors in each other's place change a map by far more than they allow."""
    if variant == 'mamba2d':
        arch = dict(embed_dims=[16, 16, 32, 32], depths=[2, 1, 1, 1], d_state=3)
        official, model = tensors_of(mamba2d_backbone(**arch)), Mamba2D(arch)
    else:
        arch = dict(embed_dims=16, depths=[1, 1], d_state=3, ssm_ratio=1.0, version=variant)
        official, model = tensors_of(vmamba_pyramid(**arch, out_indices=(0, 1))), VMamba(arch, out_indices=(0, 1))
    tensors = convert_checkpoint({'state_dict': official})[0]['state_dict']
    model.double().eval().load_state_dict(tensors, strict=True)
    images = torch.randn(1, 3, 32, 40, dtype=torch.float64)
    unnoticed, count = [], 0
    with torch.no_grad():
        before = model(images)
        for what, changed in exchanged(tensors):
            maps = torch.func.functional_call(model, changed, images)
            if max((a - b).abs().max() for a, b in zip(maps, before, strict=True)) < 1e-3:
                unnoticed.append(what)
            count += 1
    assert not unnoticed and count > 40
