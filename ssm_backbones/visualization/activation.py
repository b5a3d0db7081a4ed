"""Activation maps of a backbone's stages."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ssm_backbones.backbones.base import SSMBackbone
from ssm_backbones.visualization.stages import check_image, evaluating, resolve_stage, stage_maps

KINDS = ('norm', 'mean', 'pca')


@torch.no_grad()
def activation_maps(
    model: SSMBackbone, image: Tensor, stages: Sequence[int], kind: str = 'norm', channels: Sequence[int] | None = None
) -> dict[int, np.ndarray]:
    """Compute the activation maps of chosen stages of a backbone for an image.

    Args:
        model: The backbone.
        image: One preprocessed image, (1, in_channels, H, W) or (in_channels, H, W).
        stages: Numbers of the stages; negative ones count from the end.
        kind: Value of each pixel of the map after the stage's blocks, before any norm: ``'norm'``, the Euclidean norm
            over channels; ``'mean'``, the mean absolute value; ``'pca'``, the first three principal components of the
            map's pixels, as colours.
        channels: Channels whose values are returned instead.

    Returns:
        By the number of the stage: float32 (h, w); uint8 (h, w, 3) for ``'pca'``; float32 (len(channels), h, w) for
        channels.

    Raises:
        ValueError: If a stage, a channel or the kind does not exist.
    """
    from ssm_backbones.visualization.colours import pca_colours

    check_image(image)
    if kind not in KINDS:
        raise ValueError(f'activation maps are of the kind {", ".join(KINDS)}, got {kind!r}.')
    numbers = [resolve_stage(model, stage) for stage in stages]
    for number in numbers:
        for channel in channels or ():
            if not 0 <= channel < model.num_features[number]:
                raise ValueError(
                    f'channel {channel} does not exist: stage {number} has channels 0 to '
                    f'{model.num_features[number] - 1}.'
                )
    with evaluating(model):
        maps = stage_maps(model, image.reshape(1, *image.shape[-3:]), numbers)
    found = {}
    for number, value in maps.items():
        value = value[0].float().cpu()
        if channels is not None:
            found[number] = value[list(channels)].numpy()
        elif kind == 'pca':
            found[number] = pca_colours(value)
        else:
            found[number] = (value.norm(dim=0) if kind == 'norm' else value.abs().mean(0)).numpy()
    return found
