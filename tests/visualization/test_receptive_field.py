"""Effective receptive fields: a convolution's is its kernel, a backbone's lies where its windows lie."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from ssm_backbones import VMamba, create_backbone
from ssm_backbones.visualization import ReceptiveField, effective_receptive_field, receptive_field
from ssm_backbones.visualization.stages import cell_centre, stage_maps

FAMILIES = ('vmamba-test', 'v2m-test', 'v2m-test-hier', 'mamba2d-test')


def test_a_convolution_has_its_kernel_for_a_field() -> None:
    conv = nn.Conv2d(3, 2, (3, 5), padding=(1, 2))
    image = torch.randn(1, 3, 11, 13)
    row, column = 11 // 2, 13 // 2
    sign = conv(image)[0, :, row, column].sign()
    field = receptive_field(conv, image)
    expected = np.zeros((11, 13))
    kernel = (sign[:, None, None, None] * conv.weight).sum(0).abs().sum(0)
    expected[row - 1 : row + 2, column - 2 : column + 3] = kernel.detach().numpy()
    np.testing.assert_allclose(field.field, expected, rtol=1e-5)
    assert field.centre == (row, column) and field.images == 1
    assert field.side(1) == 5


def test_it_is_the_mean_over_the_images() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.GELU(), nn.Conv2d(4, 4, 3, stride=2, padding=1))
    images = torch.randn(3, 3, 8, 10)
    alone = [effective_receptive_field(model, image[None]) for image in images]
    np.testing.assert_allclose(effective_receptive_field(model, images), np.mean(alone, 0), rtol=1e-6)
    np.testing.assert_allclose(effective_receptive_field(model, list(images.split(2))), np.mean(alone, 0), rtol=1e-6)


def test_curve_and_side() -> None:
    values = np.zeros((5, 7))
    values[2, 3], values[1, 3], values[2, 5], values[0, 0] = 4, 2, 3, 1
    field = ReceptiveField(values, (2.0, 3.0), 1)
    sides, shares = field.curve()
    assert sides.tolist() == [1, 3, 5, 7]
    np.testing.assert_allclose(shares, [0.4, 0.6, 0.9, 1])
    assert [field.side(share) for share in (0.4, 0.41, 0.9, 1)] == [1, 3, 5, 7]
    # Between two pixels of an even map, the smallest square holds four of them.
    sides, shares = ReceptiveField(np.ones((4, 4)), (1.5, 1.5), 1).curve()
    assert sides.tolist() == [2, 4] and shares.tolist() == [0.25, 1]
    with pytest.raises(ValueError, match='a share lies in'):
        field.side(0)


@pytest.mark.parametrize('name', FAMILIES)
def test_finite_differences(name: str) -> None:
    model = create_backbone(name).double()
    image = torch.randn(1, 3, 48, 40, dtype=torch.float64)
    stage = len(model.stages) - 1

    def target(given: torch.Tensor) -> float:
        value = stage_maps(model.eval(), given, [stage])[stage]
        return float(value[0, :, value.shape[2] // 2, value.shape[3] // 2].abs().sum())

    field = effective_receptive_field(model.train(), image)
    assert model.training and all(module.training for module in model.modules())
    for place in ((20, 19), (33, 30)):
        expected = 0.0
        for channel in range(3):
            step = torch.zeros_like(image)
            step[0, channel, place[0], place[1]] = 1e-5
            with torch.no_grad():
                expected += abs(target(image + step) - target(image - step)) / 2e-5
        assert field[place] == pytest.approx(expected, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize(
    'model',
    [
        *[partial(create_backbone, name) for name in FAMILIES],
        partial(VMamba, dict(embed_dims=8, depths=[1, 1], d_state=2, ssm_ratio=2.0, version='v0'), out_indices=(0, 1)),
    ],
    ids=[*FAMILIES, 'vmamba-v0'],
)
def test_centres_are_those_of_the_window(model) -> None:
    """Without their blocks, a stem and its downsamplings see a window around what is called the centre."""
    model = model()
    for stage in model.stages:
        stage.blocks = nn.ModuleList([nn.Identity()])
    for stage in range(min(len(model.stages), 2)):
        field = receptive_field(model, torch.rand(1, 3, 64, 64), stage)
        rows, columns = np.nonzero(field.field)
        assert ((rows.min() + rows.max()) / 2, (columns.min() + columns.max()) / 2) == field.centre
        assert cell_centre(model, stage, 1) - cell_centre(model, stage, 0) == model.stage_strides[stage]


def test_what_cannot_be_averaged() -> None:
    model = create_backbone('vmamba-test')
    image = torch.randn(1, 3, 32, 32)
    for images, stage, message in (
        ([image, image[:, :, :16]], None, 'differ in size: 32x32 and 32x16'),
        ([], None, 'no images'),
        (image, 4, r'stage 4 does not exist: the VMamba that was built has stages 0 to 3 \(-1 is the last\)'),
        (image * torch.nan, None, 'not finite'),
    ):
        with pytest.raises(ValueError, match=message):
            receptive_field(model, images, stage)
    with pytest.raises(ValueError, match='zero everywhere'):
        receptive_field(
            nn.Sequential(nn.Conv2d(3, 1, 1), nn.ReLU(), nn.Conv2d(1, 1, 1, bias=False)).apply(
                lambda module: nn.init.constant_(module.weight, -1) if hasattr(module, 'weight') else None
            ),
            torch.full((1, 3, 4, 4), 5.0),
        )
