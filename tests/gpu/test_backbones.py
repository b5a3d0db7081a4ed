"""The three backbones on a GPU against themselves on the CPU, in features and gradients."""

import pytest
import torch
from mmengine.registry import MODELS
from torch import Tensor, nn

import ssm_backbones  # noqa: F401

TYPES = ('VMamba', 'V2M', 'Mamba2D')


def features_and_gradients(model: nn.Module, image: Tensor) -> tuple[list[Tensor], dict[str, Tensor]]:
    model.zero_grad()
    features = model(image)
    sum(feature.float().square().mean() for feature in features).backward()
    grads = {name: value.grad.cpu() for name, value in model.named_parameters() if value.grad is not None}
    return [feature.detach().float().cpu() for feature in features], grads


@pytest.mark.parametrize('name', TYPES)
def test_backbone_equals_itself_on_the_cpu(name: str) -> None:
    model = MODELS.build(dict(type=name, arch='test')).eval()
    image = torch.randn(2, 3, 96, 64)
    expected, expected_grads = features_and_gradients(model, image)
    tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        got, got_grads = features_and_gradients(model.cuda(), image.cuda())
    finally:
        torch.backends.cudnn.allow_tf32 = tf32
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    assert got_grads.keys() == expected_grads.keys()
    for parameter, grad in expected_grads.items():
        error = (got_grads[parameter] - grad).norm() / grad.norm().clamp(min=1e-6)
        assert error < 1e-2, parameter


@pytest.mark.parametrize('name', TYPES)
def test_backbone_trains_under_autocast(name: str) -> None:
    model = MODELS.build(dict(type=name, arch='test')).cuda()
    with torch.autocast('cuda', torch.bfloat16):
        features = model(torch.randn(2, 3, 96, 64, device='cuda'))
        loss = sum(feature.float().square().mean() for feature in features)
    loss.backward()
    assert all(value.grad is None or value.grad.isfinite().all() for value in model.parameters())
