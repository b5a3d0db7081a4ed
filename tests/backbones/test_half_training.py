"""Trainings in half precision follow those in float32."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ssm_backbones.utils.torch_compat import release
from tests.pytorch_tools.models import FAMILIES, build

HALVES = (torch.bfloat16, torch.float16)


def batches(iterations: int):
    """Noise whose brightness tells the class; a third of the labels are wrong, so that the loss does not vanish."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(iterations):
        classes = torch.randint(4, (8,), generator=generator)
        images = torch.randn(8, 3, 32, 32, generator=generator) + classes.view(-1, 1, 1, 1)
        wrong = torch.rand(8, generator=generator) < 1 / 3
        yield images, torch.where(wrong, torch.randint(4, (8,), generator=generator), classes)


def losses(name: str, dtype: torch.dtype, iterations: int) -> torch.Tensor:
    """The losses of a training of a small classifier, with a loss scaler for float16."""
    backbone = build(name, out_indices=(1,))
    model = nn.ModuleList([backbone, nn.Linear(32 if name in ('v2m-plain', 'mamba2d') else 64, 4)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler('cpu', init_scale=1024.0, enabled=dtype == torch.float16)
    found = []
    for images, labels in batches(iterations):
        with torch.autocast('cpu', dtype, enabled=dtype != torch.float32):
            (features,) = model[0](images)
            logits = model[1](features.mean((2, 3)))
        loss = F.cross_entropy(logits.float(), labels)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        found.append(loss.detach())
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    return torch.stack(found)


@pytest.mark.slow
@pytest.mark.skipif(release() < (2, 3), reason='a loss scaler for CPUs came with torch 2.3')
@pytest.mark.parametrize('name', FAMILIES)
def test_two_hundred_iterations_reach_the_loss_of_float32(name: str) -> None:
    expected = losses(name, torch.float32, 200)
    # It has learnt something.
    assert expected[-50:].mean() < 0.9 * expected[:10].mean()
    for dtype in HALVES:
        found = losses(name, dtype, 200)
        assert found.isfinite().all()
        assert found[-50:].mean().item() == pytest.approx(expected[-50:].mean().item(), rel=0.05), dtype


@pytest.mark.skipif(release() < (2, 3), reason='a loss scaler for CPUs came with torch 2.3')
def test_a_few_iterations_follow_float32() -> None:
    expected = losses('vmamba', torch.float32, 8)
    for dtype in HALVES:
        torch.testing.assert_close(losses('vmamba', dtype, 8), expected, rtol=0.05, atol=0)
