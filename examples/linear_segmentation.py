#!/usr/bin/env python
"""Train a linear segmentation head on exported features: no config, no host library, plain PyTorch.

The features are those of ``tools/export_features.py``, of the training and the validation images of a data set whose
config knows its label maps (mmseg's do)::

    python tools/export_features.py CONFIG CHECKPOINT train --out features/train
    python tools/export_features.py CONFIG CHECKPOINT val --out features/val
    python examples/linear_segmentation.py features/train features/val --classes 7
"""

import argparse
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from ssm_backbones.features.dataset import FeatureDataset

IGNORED = 255


class LinearHead(nn.Module):
    """Every level through a 1x1 convolution to the classes, brought to one size and added."""

    def __init__(self, channels: Sequence[int], strides: Sequence[int], classes: int) -> None:
        super().__init__()
        self.strides = strides
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in channels)
        self.levels = nn.ModuleList(nn.Conv2d(width, classes, 1) for width in channels)

    def forward(self, maps: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        scores = [level(norm(value)) for level, norm, value in zip(self.levels, self.norms, maps, strict=True)]
        # Each cell over its square of pixels: of odd sizes, the last ones reach beyond.
        large = [
            F.interpolate(each, scale_factor=stride, mode='bilinear')[..., : size[0], : size[1]]
            for each, stride in zip(scores, self.strides, strict=True)
        ]
        return sum(large)


def labelled(folder: str) -> FeatureDataset:
    """Read an export with the label maps of its images, ADE20K's: 0 is no class, i + 1 is class i."""

    def with_labels(item):
        with Image.open(dataset.records[item['index']]['label_map']) as image:
            # As the model got the image: resized, cropped and padded by the config.
            labels = torch.from_numpy(dataset.to_input(item['index'], np.array(image), fill=0)).long()
        item['labels'] = torch.where(labels == 0, IGNORED, labels - 1)
        return item

    dataset = FeatureDataset(folder, dtype=torch.float32, transform=with_labels)
    return dataset


def mean_iou(head: nn.Module, dataset: FeatureDataset, classes: int) -> float:
    """Compute the intersection over union of the head's predictions, mean over the classes that occur.

    What the config crops from an image is not predicted and does not count.
    """
    confusion = torch.zeros(classes, classes)
    head.eval()
    with torch.no_grad():
        for batch in DataLoader(dataset, batch_size=1):
            labels = batch['labels']
            known = labels != IGNORED
            found = head(batch['maps'], labels.shape[1:]).argmax(1)
            pairs = labels[known] * classes + found[known]
            confusion += torch.bincount(pairs, minlength=classes**2).view(classes, classes)
    union = confusion.sum(0) + confusion.sum(1) - confusion.diag()
    return (confusion.diag() / union.clamp(min=1))[confusion.sum(1) > 0].mean().item()


def train(training: FeatureDataset, classes: int, epochs: int, batch_size: int = 4) -> tuple[LinearHead, list[float]]:
    """Train a head and return it with the mean loss of each epoch. Images of a batch have to be of one size."""
    head = LinearHead(training.channels(), training.strides(), classes)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
    losses = []
    for _ in range(epochs):
        head.train()
        total, steps = 0.0, 0
        for batch in DataLoader(training, batch_size=batch_size, shuffle=True):
            labels = batch['labels']
            loss = F.cross_entropy(head(batch['maps'], labels.shape[1:]), labels, ignore_index=IGNORED)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total, steps = total + loss.item(), steps + 1
        losses.append(total / steps)
    return head, losses


def main(argv: Sequence[str] | None = None) -> float:
    """Train and evaluate; returns the mean intersection over union."""
    parser = argparse.ArgumentParser(description='Train a linear segmentation head on exported features.')
    parser.add_argument('training', help='export of the training images')
    parser.add_argument('validation', help='export of the validation images')
    parser.add_argument('--classes', type=int, default=7)
    parser.add_argument('--epochs', type=int, default=20)
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    head, losses = train(labelled(args.training), args.classes, args.epochs)
    score = mean_iou(head, labelled(args.validation), args.classes)
    print(f'loss {losses[0]:.3f} -> {losses[-1]:.3f}, mean IoU {score:.3f}')
    return score


if __name__ == '__main__':
    main()
