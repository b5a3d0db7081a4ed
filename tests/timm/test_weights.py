"""Weights of the models with timm's interface: the authors', this package's and timm's own files."""

import pytest
import torch

from ssm_backbones import create_backbone
from ssm_backbones.checkpoints import CheckpointError, convert_checkpoint
from tests.checkpoints.layouts import mamba2d_classifier, random_tensors
from tests.checkpoints.small import classifier, prefixed, pyramid

timm = pytest.importorskip('timm', reason="timm is not installed (pip install 'ssm-backbones[timm]')")

import ssm_backbones.timm  # noqa: E402, F401

NAMES = ['vmamba_test', 'v2m_test', 'v2m_test_hier', 'mamba2d_test']
MAMBA2D = dict(embed_dims=[16, 24, 32, 64], depths=[2, 2, 1, 1], num_classes=10)


def same(state, expected):
    return state.keys() == expected.keys() and all(torch.equal(value, expected[name]) for name, value in state.items())


@pytest.fixture(params=['vmamba', 'mamba2d'])
def official(request, tmp_path):
    """Name, path and converted tensors of an official classifier of 10 classes."""
    vmamba = request.param == 'vmamba'
    held = {'model': classifier()} if vmamba else {'state_dict': random_tensors(mamba2d_classifier(**MAMBA2D))}
    torch.save(held, tmp_path / 'official.pth')
    return f'{request.param}_test', tmp_path / 'official.pth', convert_checkpoint(held)[0]['state_dict']


def test_official_classifiers(official, log):
    name, path, expected = official
    assert same(timm.create_model(name, pretrained=path, num_classes=10).state_dict(), expected)
    assert not log
    named = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(url=path.as_uri()), num_classes=10)
    assert same(named.state_dict(), expected)
    later = timm.create_model(name, checkpoint_path=str(path), num_classes=10)
    assert same(later.state_dict(), expected)
    last = later.default_cfg['classifier']
    other = timm.create_model(name, pretrained=path, num_classes=5).state_dict()
    assert other[f'{last}.weight'].shape[0] == 5
    assert log == [f'{path}: {last} kept as initialised.']
    assert same(*({k: v for k, v in state.items() if not k.startswith(last)} for state in (other, expected)))
    bare = timm.create_model(name, pretrained=path, num_classes=0, in_chans=1)
    stem = f'{bare.default_cfg["first_conv"]}.weight'
    torch.testing.assert_close(bare.state_dict()[stem], expected[stem].sum(1, keepdim=True))
    features = timm.create_model(name, pretrained=path, features_only=True, out_indices=(1, 3))
    assert torch.equal(
        features.state_dict()['backbone.stages.3.blocks.0.norm1.weight'],
        expected['backbone.stages.3.blocks.0.norm1.weight'],
    )
    getter = timm.create_model(name, pretrained=path, features_only=True, feature_cls='getter')
    assert torch.equal(getter.state_dict()[f'model.{stem}'], expected[stem])


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('prefix', ['', 'module.', '_orig_mod.', 'model.'])
def test_own_classifiers_under_any_prefix(name, prefix, tmp_path):
    expected = timm.create_model(name, num_classes=10).state_dict()
    torch.save({'state_dict': prefixed(prefix, expected)}, tmp_path / 'own.pth')
    assert same(timm.create_model(name, num_classes=10, pretrained=str(tmp_path / 'own.pth')).state_dict(), expected)
    features = timm.create_model(name, pretrained=tmp_path / 'own.pth', features_only=True, in_chans=6)
    assert features.in_chans == 6
    torch.save(features.state_dict(), tmp_path / 'features.pth')
    back = create_backbone(name.replace('_', '-'), tmp_path / 'features.pth', out_indices=-1, in_channels=6)
    first = features.default_cfg['first_conv'].removeprefix('backbone.')
    state = {f'backbone.{key}': value for key, value in back.state_dict().items() if not key.startswith(first)}
    assert all(torch.equal(value, expected[key]) for key, value in state.items())


def test_a_backbone_alone_leaves_the_head_new(tmp_path, log):
    torch.save(create_backbone('vmamba-test').state_dict(), tmp_path / 'bare.pth')
    torch.save({'state_dict': prefixed('backbone.', pyramid()) | {'neck.weight': torch.ones(1)}}, tmp_path / 'det.pth')
    for path in (tmp_path / 'bare.pth', tmp_path / 'det.pth'):
        timm.create_model('vmamba_test', pretrained=path)
        assert log.pop() == f'{path}: head.fc kept as initialised.'


def test_what_does_not_fit_is_refused(tmp_path):
    other = timm.create_model('mamba2d_test', num_classes=10).state_dict()
    torch.save(other, tmp_path / 'other.pth')
    with pytest.raises(CheckpointError, match='does not fit the VMamba that was built'):
        timm.create_model('vmamba_test', pretrained=tmp_path / 'other.pth')
    del other['head.norm1.weight']
    torch.save(other, tmp_path / 'other.pth')
    with pytest.raises(CheckpointError, match=r"Mamba2D's head: head.norm1.weight \(64\) is missing"):
        timm.create_model('mamba2d_test', pretrained=tmp_path / 'other.pth')
    with pytest.raises(CheckpointError, match="no weights of 'v2m_tiny' were published"):
        timm.create_model('v2m_tiny', pretrained=True)
    with pytest.raises(ValueError, match='TORCH_HOME'):
        timm.create_model('vmamba_tiny', pretrained=True, cache_dir=str(tmp_path))


def test_what_timm_saves_and_loads_itself(tmp_path):
    pytest.importorskip('huggingface_hub')
    model = timm.create_model('vmamba_test', num_classes=10).eval()
    timm.models.save_for_hf(model, tmp_path / 'saved')
    loaded = timm.create_model(f'local-dir:{tmp_path / "saved"}', pretrained=True).eval()
    assert loaded.num_classes == 10 and same(loaded.state_dict(), model.state_dict())
