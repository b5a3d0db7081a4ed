#!/usr/bin/env python
"""transformers' DETR, Mask2Former and UperNet on a backbone of this package, through its ``TimmBackbone``.

pip install 'ssm-backbones[timm]' transformers
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import ssm_backbones.timm  # isort: skip  (names the backbones to timm)
from transformers import (
    DetrConfig,
    DetrForObjectDetection,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    TimmBackboneConfig,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

from ssm_backbones.checkpoints import load_backbone


def detector(name: str, classes: int, **options: Any) -> nn.Module:
    """Build a DETR on the last map of a backbone, named as timm names it ('vmamba_tiny').

    Args:
        name: timm's name of the backbone.
        classes: Number of classes.
        options: Arguments of ``DetrConfig``.
    """
    backbone = TimmBackboneConfig(backbone=name, out_indices=[-1])
    return DetrForObjectDetection(DetrConfig(backbone_config=backbone, num_labels=classes, **options))


def segmentor(name: str, classes: int, **options: Any) -> nn.Module:
    """Build a UperNet on all four maps; ``options`` are arguments of ``UperNetConfig``."""
    backbone = TimmBackboneConfig(backbone=name, out_indices=[0, 1, 2, 3])
    config = UperNetConfig(backbone_config=backbone, num_labels=classes, use_auxiliary_head=False, **options)
    return UperNetForSemanticSegmentation(config)


def mask_segmentor(name: str, classes: int, **options: Any) -> nn.Module:
    """Build a Mask2Former on all four maps; ``options`` are arguments of ``Mask2FormerConfig``."""
    backbone = TimmBackboneConfig(backbone=name, out_indices=[0, 1, 2, 3])
    return Mask2FormerForUniversalSegmentation(
        Mask2FormerConfig(backbone_config=backbone, num_labels=classes, **options)
    )


def load_weights(model: nn.Module, checkpoint: str) -> None:
    """Load the weights of a model's backbone, official or of this package, strictly."""
    (features,) = (part for part in model.modules() if isinstance(part, ssm_backbones.timm.SSMFeatures))
    load_backbone(features.backbone, checkpoint)


def train_steps(model: nn.Module, batch: Callable[[], dict[str, Any]], steps: int) -> Sequence[float]:
    """Train on batches; the loss of each step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(steps):
        loss: Tensor = model(**batch()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == '__main__':
    torch.manual_seed(0)
    images = torch.randn(2, 3, 128, 96)
    boxes = [dict(class_labels=torch.tensor([1]), boxes=torch.tensor([[0.5, 0.5, 0.4, 0.3]])) for _ in images]
    detr = detector('vmamba_tiny', classes=2)
    for step, value in enumerate(train_steps(detr, lambda: dict(pixel_values=images, labels=boxes), steps=5)):
        print(f'DETR, step {step}: loss {value:.3f}')
    labels = (images.mean(1) > 0).long()
    upernet = segmentor('vmamba_tiny', classes=2)
    for step, value in enumerate(train_steps(upernet, lambda: dict(pixel_values=images, labels=labels), steps=5)):
        print(f'UperNet, step {step}: loss {value:.3f}')
    masks = [torch.stack([each == 0, each == 1]).float() for each in labels]
    mask2former = mask_segmentor('vmamba_tiny', classes=2)
    batch = dict(pixel_values=images, mask_labels=masks, class_labels=[torch.tensor([0, 1])] * 2)
    for step, value in enumerate(train_steps(mask2former, lambda: batch, steps=5)):
        print(f'Mask2Former, step {step}: loss {value:.3f}')
