#!/usr/bin/env python
"""A backbone of this package under torchvision's feature pyramid and a head of one's own, without configs."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import FeaturePyramidNetwork

from ssm_backbones import create_backbone


class Segmentor(nn.Module):
    """Images (B, 3, H, W) to class scores (B, classes, H, W)."""

    def __init__(self, name: str, classes: int, pretrained: str | None = None, width: int = 64) -> None:
        super().__init__()
        self.backbone = create_backbone(name, pretrained, out_indices=(0, 1, 2, 3))
        self.pyramid = FeaturePyramidNetwork(self.backbone.feature_info.channels(), width)
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        maps = {f'{place}': value for place, value in enumerate(self.backbone(images))}
        finest: Tensor = self.pyramid(maps)['0']
        return F.interpolate(self.head(finest), images.shape[2:], mode='bilinear')


def train_steps(model: nn.Module, images: Tensor, labels: Tensor, steps: int) -> Sequence[float]:
    """Fit a batch; the loss of each step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
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
    segmentor = Segmentor('vmamba-tiny', classes=2)
    print(segmentor.backbone.feature_info)
    for step, value in enumerate(train_steps(segmentor, images, bright, steps=10)):
        print(f'step {step}: loss {value:.3f}')
