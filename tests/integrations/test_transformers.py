"""transformers' detectors and segmentors on the backbones, by the example, and its TimmBackbone alone."""

import pytest
import safetensors.torch
import torch

from ssm_backbones import create_backbone

transformers = pytest.importorskip('transformers', minversion='5', reason='make tools installs it')
pytest.importorskip('timm', reason='make tools installs it')

from tests.examples.test_examples import load  # noqa: E402

NAMES = ['vmamba_test', 'v2m_test_hier', 'mamba2d_test']
SMALL = dict(
    d_model=32,
    encoder_layers=1,
    decoder_layers=1,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=32,
    decoder_ffn_dim=32,
    num_queries=5,
)


@pytest.fixture(scope='module')
def example():
    return load('transformers_detection')


@pytest.mark.parametrize('name', NAMES)
def test_the_backbone_alone(name, tmp_path):
    import ssm_backbones.timm  # noqa: F401

    images = torch.randn(1, 3, 64, 96)
    config = transformers.TimmBackboneConfig(backbone=name, out_indices=[1, 3])
    model = transformers.AutoBackbone.from_config(config).eval()
    backbone = create_backbone(name.replace('_', '-'), out_indices=(1, 3)).eval()
    backbone.load_state_dict(model._backbone.backbone.state_dict())
    expected = backbone(images)
    assert all(map(torch.equal, model(images).feature_maps, expected))
    assert model.channels == [each.shape[1] for each in expected]
    hidden = model(images, output_hidden_states=True)
    assert len(hidden.hidden_states) == 4
    assert all(map(torch.equal, hidden.feature_maps, expected))
    model.save_pretrained(tmp_path / 'saved')
    saved = safetensors.torch.load_file(tmp_path / 'saved' / 'model.safetensors')
    assert len(saved) == len(backbone.state_dict())


@pytest.mark.parametrize('name', NAMES)
def test_detr_trains_and_is_saved(example, name, tmp_path):
    images = torch.randn(2, 3, 64, 96)
    labels = [dict(class_labels=torch.tensor([1]), boxes=torch.tensor([[0.5, 0.5, 0.4, 0.3]])) for _ in images]
    model = example.detector(name, classes=2, **SMALL)
    torch.save(create_backbone(name.replace('_', '-')).state_dict(), tmp_path / 'weights.pth')
    example.load_weights(model, str(tmp_path / 'weights.pth'))
    losses = example.train_steps(model, lambda: dict(pixel_values=images, labels=labels), steps=8)
    assert losses[-1] < losses[0]
    assert all(parameter.grad is not None for key, parameter in model.named_parameters() if '.backbone.' in key)
    model.eval().save_pretrained(tmp_path / 'detr')
    again, report = transformers.DetrForObjectDetection.from_pretrained(tmp_path / 'detr', output_loading_info=True)
    again.eval()
    assert not report['missing_keys'] and not report['unexpected_keys']
    with torch.no_grad():
        torch.testing.assert_close(again(images).logits, model(images).logits)


@pytest.mark.parametrize('name', NAMES)
def test_upernet_trains(example, name):
    images = torch.randn(2, 3, 64, 96)
    labels = (images.mean(1) > 0).long()
    model = example.segmentor(name, classes=2, hidden_size=16)
    losses = example.train_steps(model, lambda: dict(pixel_values=images, labels=labels), steps=6)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize('name', NAMES)
def test_mask2former_trains(example, name):
    images = torch.randn(2, 3, 64, 96)
    labels = (images.mean(1) > 0).long()
    masks = [torch.stack([each == 0, each == 1]).float() for each in labels]
    small = dict(
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=32,
        dim_feedforward=32,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=5,
        train_num_points=256,
    )
    model = example.mask_segmentor(name, classes=2, **small)
    batch = dict(pixel_values=images, mask_labels=masks, class_labels=[torch.tensor([0, 1])] * 2)
    losses = example.train_steps(model, lambda: batch, steps=8)
    assert losses[-1] < losses[0]
    features = [
        key for key, parameter in model.named_parameters() if 'encoder._backbone' in key and parameter.grad is None
    ]
    assert not features
