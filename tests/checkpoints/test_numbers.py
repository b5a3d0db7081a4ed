"""A converted model computes what the official tensors mean, by an oracle that knows the official names alone."""

import pytest
import torch
from mmpretrain.registry import MODELS as CLASSIFIERS

from ssm_backbones import VMamba
from ssm_backbones.checkpoints import convert_checkpoint
from tests.checkpoints import official_vmamba
from tests.checkpoints.layouts import random_tensors, vmamba_classifier, vmamba_pyramid

SMALL_VMAMBA = {
    'v2': dict(embed_dims=8, depths=[1, 2, 1, 1], ssm_ratio=2.0, d_state=2),
    'v2-narrow': dict(embed_dims=32, depths=[1, 1, 1, 2], ssm_ratio=1.0, d_state=1),
    'v0': dict(embed_dims=8, depths=[1, 2, 1, 1], ssm_ratio=2.0, d_state=3, version='v0'),
}


def tensors_of(layout):
    """Random tensors of float64 at which no activation vanishes or explodes, all of them different."""
    tensors = random_tensors(layout, torch.float64)
    for name, tensor in tensors.items():
        if name.endswith('A_logs'):
            tensor.mul_(0.3)
        elif tensor.ndim > 1:
            tensor.mul_(tensor[0].numel() ** -0.5)
        elif name.endswith('weight'):
            tensor.mul_(0.2).add_(1.0)
    return tensors


def spelled_stacked(tensors):
    """v2 with the projections of the routes stacked, as earlier code of the authors had them."""
    spelled = {}
    for name, tensor in tensors.items():
        if name.endswith(('x_proj.weight', 'dt_projs.weight')):
            name, tensor = name.replace('.weight', '_weight'), tensor.unflatten(0, (4, -1))
        spelled[name] = tensor
    return spelled


def spelled_first(tensors):
    """v0 as the code that trained it named things."""
    changes = [('patch_embed.0', 'patch_embed.proj'), ('patch_embed.2', 'patch_embed.norm'),
               ('.op.', '.self_attention.'), ('downsample.1', 'downsample.norm'),
               ('downsample.2', 'downsample.reduction'), ('classifier.norm', 'norm'), ('classifier.head', 'head')]
    spelled = {}
    for name, tensor in tensors.items():
        if '.blocks.' in name:
            name = name.replace('.norm.', '.ln_1.')
        for old, new in changes:
            name = name.replace(old, new)
        spelled[name] = tensor
    return spelled


@pytest.mark.parametrize(('variant', 'spelling'), [
    ('v2', None), ('v2-narrow', None), ('v0', None), ('v2', spelled_stacked), ('v0', spelled_first)])
def test_vmamba_classifiers(variant, spelling):
    options = SMALL_VMAMBA[variant]
    tensors = tensors_of(vmamba_classifier(**options, num_classes=5))
    converted, report = convert_checkpoint({'model': spelling(tensors) if spelling else tensors})
    assert report.kind == 'classifier'
    arch = {'version': 'v2', **options}
    model = CLASSIFIERS.build(dict(
        type='mmpretrain.ImageClassifier', backbone=dict(type='VMamba', arch=arch, out_indices=(3,)),
        neck=dict(type='mmpretrain.GlobalAveragePooling'),
        head=dict(type='mmpretrain.LinearClsHead', num_classes=5, in_channels=8 * options['embed_dims'])))
    model.double().eval()
    model.load_state_dict(converted['state_dict'], strict=True)
    images = torch.randn(2, 3, 64, 32, dtype=torch.float64)
    with torch.no_grad():
        logits = model.head.fc(model.neck(model.backbone(images))[0])
        torch.testing.assert_close(logits, official_vmamba.classify(tensors, images), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('variant', ['v2', 'v0'])
def test_vmamba_pyramids(variant):
    options = SMALL_VMAMBA[variant]
    tensors = tensors_of(vmamba_pyramid(**options))
    whole = {'backbone.' + name: tensor for name, tensor in tensors.items()} | {'neck.weight': torch.ones(3)}
    converted, _ = convert_checkpoint({'state_dict': whole}, backbone_only=True)
    model = VMamba({'version': 'v2', **options}).double().eval()
    model.load_state_dict(converted['state_dict'], strict=True)
    images = torch.randn(1, 3, 32, 64, dtype=torch.float64)
    with torch.no_grad():
        expected = [official_vmamba.norm(tensors, f'outnorm{i}', x)
                    for i, x in enumerate(official_vmamba.forward(tensors, images))]
        for result, correct in zip(model(images), expected, strict=True):
            torch.testing.assert_close(result, correct, rtol=1e-9, atol=1e-9)
