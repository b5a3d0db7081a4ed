"""What we write by the authors' names is what they published, and so are the stand-ins of the other tests."""

import pytest
import torch

from ssm_backbones import Mamba2D, VMamba
from ssm_backbones.checkpoints import convert_checkpoint, restore_checkpoint
from tests.checkpoints.layouts import MAMBA2D, VMAMBA, mamba2d_classifier, random_tensors, vmamba_classifier
from tests.checkpoints.published import published_layouts

PUBLISHED = published_layouts()


def shapes(tensors):
    return {name: list(tensor.shape) for name, tensor in tensors.items()}


def test_every_published_classifier_is_there():
    assert {model for family, model in PUBLISHED if family.startswith('VMamba')} == VMAMBA.keys()
    assert {model for family, model in PUBLISHED if family == 'Mamba2D'} == MAMBA2D.keys()


@pytest.mark.parametrize(('family', 'model'), PUBLISHED)
def test_stand_ins_have_the_published_names_and_shapes(family, model):
    layout = mamba2d_classifier(**MAMBA2D[model]) if family == 'Mamba2D' else vmamba_classifier(**VMAMBA[model])
    assert layout == PUBLISHED[family, model]


@pytest.mark.parametrize(('family', 'model'), PUBLISHED)
def test_our_models_are_given_the_published_names_and_shapes(family, model):
    """A model of ours that was trained, so that nothing but its tensors says what it is."""
    published = PUBLISHED[family, model]
    with torch.device('meta'):
        backbone = (Mamba2D if family == 'Mamba2D' else VMamba)(model, out_indices=3)
        head = {name: torch.empty(shape) for name, shape in _head(family, backbone.num_features[-1]).items()}
    state = {f'backbone.{name}': tensor for name, tensor in backbone.state_dict().items()} | head
    restored, _ = restore_checkpoint({'meta': {'epoch': 300}, 'state_dict': state})
    assert shapes(restored['state_dict' if family == 'Mamba2D' else 'model']) == published


def _head(family, width):
    if family != 'Mamba2D':
        return {'head.fc.weight': (1000, width), 'head.fc.bias': (1000,)}
    layers = {'norm1': (width,), 'fc1': (4 * width, width), 'norm2': (4 * width,), 'fc2': (1000, 4 * width)}
    return {
        f'head.{name}.{part}': shape if part == 'weight' else shape[:1]
        for name, shape in layers.items()
        for part in ('weight', 'bias')
    }


@pytest.mark.parametrize('norms', ['classifier', 'outnorm'])
def test_the_pyramid_of_a_trained_detector_is_given_the_same_names(norms):
    """Their detectors and segmentors build on the classifiers' code: stacked projections there, too."""
    layout = vmamba_classifier(embed_dims=16, depths=[1, 1, 2, 1], ssm_ratio=1.0, num_classes=10)
    ours, _ = convert_checkpoint({'model': random_tensors(layout)}, backbone_only=True)
    state = ours['state_dict']
    if norms == 'outnorm':
        state |= {f'norm{i}.{part}': torch.ones(16 * 2**i) for i in range(3) for part in ('weight', 'bias')}
        state = {f'backbone.{name}': tensor for name, tensor in state.items()} | {'neck.weight': torch.ones(1)}
    restored = restore_checkpoint({'state_dict': state})[0]
    names = {name.removeprefix('backbone.') for name in restored['state_dict' if norms == 'outnorm' else 'model']}
    assert {name for name in names if 'proj' in name} == {name for name in layout if 'proj' in name}
