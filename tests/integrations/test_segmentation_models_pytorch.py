"""segmentation_models_pytorch's decoders on the backbones, by the example."""

import pytest
import torch

from ssm_backbones import create_backbone

pytest.importorskip('segmentation_models_pytorch', reason='make tools installs it')
pytest.importorskip('timm', reason='make tools installs it')

from tests.examples.test_examples import load  # noqa: E402


@pytest.fixture(scope='module')
def example():
    return load('smp_segmentation')


@pytest.mark.parametrize(
    ('name', 'decoder', 'options'),
    [
        ('vmamba_test', 'Unet', {}),
        ('vmamba_test', 'UPerNet', {}),
        ('v2m_test_hier', 'FPN', dict(decoder_dropout=0.0)),
        ('mamba2d_test', 'Unet', dict(encoder_depth=4, decoder_channels=(64, 32, 16, 8))),
        ('mamba2d_test', 'UPerNet', dict(drop_path_rate=0.1)),
    ],
)
def test_decoders_train(example, name, decoder, options):
    images = torch.randn(2, 3, 64, 96)
    labels = (images.mean(1) > 0).long()
    model = example.build(name, 2, decoder, **options)
    assert model(images).shape == (2, 2, 64, 96)
    losses = example.train_steps(model, images, labels, steps=6)
    assert losses[-1] < losses[0]
    assert all(parameter.grad is not None for parameter in model.encoder.parameters())


def test_the_encoder_starts_from_a_checkpoint(example, tmp_path):
    state = create_backbone('vmamba-test').state_dict()
    torch.save(state, tmp_path / 'weights.pth')
    model = example.build('vmamba_test', 2, pretrained=str(tmp_path / 'weights.pth'))
    found = model.encoder.model.backbone.state_dict()
    assert found.keys() == state.keys() and all(torch.equal(value, state[name]) for name, value in found.items())
