#!/usr/bin/env python
"""A segmentation model of segmentation_models_pytorch on a backbone of this package.

pip install 'ssm-backbones[timm]' segmentation-models-pytorch
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ssm_backbones.timm  # noqa: F401  isort: skip  (names the backbones to timm)
import segmentation_models_pytorch as smp


def build(name: str, classes: int, decoder: str = 'Unet', pretrained: str | None = None, **options: Any) -> nn.Module:
    """Build a segmentation model: images (B, 3, H, W), of sides that 32 divides, to scores (B, classes, H, W).

    Args:
        name: timm's name of the backbone, such as 'vmamba_tiny'.
        classes: Number of classes.
        decoder: 'Unet', 'FPN', 'UPerNet' or another of segmentation_models_pytorch's models.
        pretrained: A checkpoint, path or URL. ``encoder_weights=True`` among the options takes the authors' weights.
        options: Arguments of the decoder and of the backbone.
    """
    if pretrained is not None:
        options |= dict(encoder_weights=True, pretrained_cfg_overlay=dict(file=pretrained))
    return getattr(smp, decoder)(f'tu-{name}', classes=classes, **{'encoder_weights': None, **options})


def train_steps(model: nn.Module, images: Tensor, labels: Tensor, steps: int) -> Sequence[float]:
    """Fit a batch; the loss of each step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(steps):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == '__main__':
    torch.manual_seed(0)
    images = torch.randn(2, 3, 128, 96)
    bright = (F.avg_pool2d(images.mean(1, keepdim=True), 9, 1, 4)[:, 0] > 0).long()
    for step, value in enumerate(train_steps(build('vmamba_tiny', classes=2), images, bright, steps=10)):
        print(f'step {step}: loss {value:.3f}')
