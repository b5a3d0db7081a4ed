"""Choose a base config, a batch and a schedule for one's own data."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ssm_backbones.apis.config import load_config
from ssm_backbones.backbones.base import SSMBackbone
from ssm_backbones.factory import create_backbone
from ssm_backbones.utils.configs import config_file, config_folder
from ssm_backbones.utils.errors import CommandError

_TYPES = {'vmamba': 'VMamba', 'v2m': 'V2M', 'mamba2d': 'Mamba2D'}
# The config of each task that an arch without one of its own starts from.
_OF_FAMILY = {'vmamba': 'vmamba-tiny', 'v2m': 'v2m-hier-small', 'mamba2d': 'mamba2d-tiny'}
_PATTERNS = {
    'boxes': ('faster-rcnn_{}_fpn_1x_coco.py', 'mask-rcnn_{}_fpn_1x_coco.py'),
    'masks': ('mask-rcnn_{}_fpn_1x_coco.py',),
    'seg': ('{}_upernet_8xb*_ade20k-512x512.py',),
    'cls': ('{}_*xb*_in1k.py',),
}
# Images that a training sees, whatever their number, and bounds of the epochs: rules of thumb, not measured. COCO,
# ADE20K and fine-tuning on ImageNet come to the usual 12, 128 and 30 epochs.
_SEEN = {'det': (60_000, 12, 150), 'seg': (400_000, 128, 800), 'cls': (200_000, 30, 200)}
_PIXELS = {'det': 1333 * 800, 'seg': 512 * 512, 'cls': 224 * 224}
# A training step of VMamba-T on two images of 512x512 in float32 takes 1.5 GiB beside the interpreter and the weights
# (docs/use_with_other_heads.md); heads half as much again, other backbones in proportion to their parameters' root.
_BYTES_PER_PIXEL = 1.5 * 2**30 / (2 * 512 * 512) * 1.5
_TINY = 30e6
_LARGEST_BATCH = {'det': 16, 'seg': 16, 'cls': 128}


@dataclass(frozen=True)
class Base:
    """A config to inherit from, and what the backbone changes in it.

    Attributes:
        name: Below the folder of configs.
        backbone: Settings of the backbone that differ.
        channels: Channels of the maps if they differ.
        weights: Address of the classifier's weights that training starts from, or None.
        without_masks: Whether a Mask R-CNN has to be made a Faster R-CNN.
    """

    name: str
    backbone: Mapping[str, Any]
    channels: tuple[int, ...] | None
    weights: str | None
    without_masks: bool


@functools.cache
def build_empty(backbone: str) -> SSMBackbone:
    """Build a backbone without memory for its parameters.

    Raises:
        CommandError: If there is no such backbone.
    """
    try:
        with torch.device('meta'):
            return create_backbone(backbone)
    except ValueError as error:
        raise CommandError(str(error)) from error


def find_base(task: str, backbone: str, masks: bool) -> Base:
    """Find the config for a task and a backbone.

    Args:
        task: ``'det'``, ``'seg'`` or ``'cls'``.
        backbone: Family and arch, as :func:`~ssm_backbones.create_backbone` takes them.
        masks: Whether a detector learns masks.

    Raises:
        CommandError: If there is no such backbone.
    """
    built = build_empty(backbone)
    family, _, arch = backbone.partition('-')
    kind = task if task != 'det' else 'masks' if masks else 'boxes'
    found = _config_of(family, backbone, kind)
    settings: dict[str, Any] = {}
    channels = None
    if found is None:
        found = _config_of(family, _OF_FAMILY[family], kind)
        assert found is not None, 'each family has its configs'
        settings['arch'] = arch
        channels = tuple(built.out_channels) if len(built.out_channels) > 1 else None
        if channels is None and task != 'cls':
            raise CommandError(f'backbone {backbone} has no config for {task}; see the configs of {family}.')
        if task == 'cls':
            channels = tuple(built.out_channels[-1:])
    name = f'{family}/{found}'
    weights = None if 'arch' in settings else _weights(family, backbone)
    without_masks = kind == 'boxes' and found.startswith('mask-rcnn')
    return Base(name, settings, channels, weights, without_masks)


def _config_of(family: str, backbone: str, kind: str) -> str | None:
    folder = config_folder() / family
    for pattern in _PATTERNS[kind]:
        found = sorted(folder.glob(pattern.format(backbone)))
        if found:
            return found[0].name
    return None


def _weights(family: str, backbone: str) -> str | None:
    """Return the address of the authors' ImageNet weights, which the backbone's segmentation config starts from."""
    name = _config_of(family, backbone, 'seg')
    if name is None:
        return None
    init_cfg = load_config(config_file(f'{family}/{name}')).model.backbone.get('init_cfg') or {}
    return init_cfg.get('checkpoint')


def parameters(backbone: str) -> int:
    """Count the parameters of a backbone."""
    return sum(parameter.numel() for parameter in build_empty(backbone).parameters())


def choose_batch(task: str, backbone: str, images: int) -> int:
    """Choose a batch, a power of two, that should fit into the memory of the GPU, or of the machine if it has none."""
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory
    else:
        memory = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
    needed = _PIXELS[task] * _BYTES_PER_PIXEL * math.sqrt(parameters(backbone) / _TINY)
    fitting = max((0.8 * memory - 2**30) / needed, 1)
    # Half of the images at most, so that an epoch has two steps.
    return 2 ** int(math.log2(max(min(fitting, _LARGEST_BATCH[task], images / 2), 1)))


def choose_epochs(task: str, images: int) -> int:
    """Choose a number of epochs: more where there are few images."""
    seen, least, most = _SEEN[task]
    return min(max(math.ceil(seen / images), least), most)
