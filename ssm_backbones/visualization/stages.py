"""Stages of a backbone: numbers, strides, positions in the image, and the maps after their blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ssm_backbones.backbones.base import SSMBackbone
from ssm_backbones.layers.common import PatchMerging


def resolve_stage(backbone: SSMBackbone, stage: int | None) -> int:
    """Resolve the number of a stage: negative ones count from the end, None is the last one.

    Of a backbone of one resolution (V2M's plain layout) every block is a stage.

    Raises:
        ValueError: If there is no such stage, or it was not built because no map of it or of a later one is returned.
    """
    return _resolve('stage', stage, len(backbone.stages), f'the {type(backbone).__name__} that was built')


def resolve_block(backbone: SSMBackbone, stage: int, block: int | None) -> int:
    """Resolve the number of a block in its stage: negative ones count from the end, None is the last one.

    Raises:
        ValueError: If there is no such block.
    """
    return _resolve('block', block, len(backbone.stages[stage].blocks), f'stage {stage}')


def _resolve(kind: str, number: int | None, count: int, owner: str) -> int:
    number = -1 if number is None else number
    if not -count <= number < count:
        known = f'{kind}s 0 to {count - 1}' if count > 1 else f'one {kind}, 0'
        raise ValueError(f'{kind} {number} does not exist: {owner} has {known} (-1 is the last).')
    return number % count


def spread_stages(backbone: SSMBackbone) -> list[int]:
    """Return the stages to show by default: all, or for a plain V2M the last block of each quarter."""
    count = len(backbone.stages)
    return sorted({max(count * quarter // 4 - 1, 0) for quarter in range(1, 5)}) if count > 4 else list(range(count))


def cell_centre(backbone: SSMBackbone, stage: int, index: float) -> float:
    """Find the coordinate in the image, along one axis, at which pixel ``index`` of a stage's map is centred.

    It is the centre of the receptive field of the stem's and downsamplings' convolutions; pixel centres are integers.
    A convolution of size k, stride s and padding p centres its output i at ``s * i - p + (k - 1) / 2``.
    """
    layers = [backbone.patch_embed, *(backbone.stages[i].downsample for i in range(stage))]
    modules = [module for layer in layers for module in layer.modules()]
    reducing = [module for module in modules if isinstance(module, nn.Conv2d | PatchMerging)]
    for module in reversed(reducing):
        if isinstance(module, nn.Conv2d):
            size, stride, padding = module.kernel_size[0], module.stride[0], int(module.padding[0])
            index = stride * index - padding + (size - 1) / 2
        else:
            index = 2 * index + 0.5
    return index


def stage_maps(backbone: SSMBackbone, images: Tensor, stages: Sequence[int]) -> dict[int, Tensor]:
    """Compute the maps after the blocks of chosen stages, before any norm of the stage or of the output.

    A LayerNorm gives all pixels the same norm and the same sum over channels, so these are informative only before it.

    Args:
        backbone: The backbone.
        images: Preprocessed images (B, in_channels, H, W).
        stages: Numbers of the stages, from 0 on.

    Returns:
        For each stage its map (B, C, h, w), without class tokens, connected to the images for gradients.
    """
    wanted = {f'stage {stage}': backbone.stages[stage].blocks[-1] for stage in stages}
    runs = runs_of(backbone, images, wanted)
    maps = {stage: runs[f'stage {stage}'].result for stage in stages}
    return {stage: backbone.drop_class_tokens(value).permute(0, 3, 1, 2) for stage, value in maps.items()}


class Run(NamedTuple):
    """Input and output of a module within a model."""

    given: Tensor
    result: Tensor


def runs_of(model: nn.Module, images: Tensor, modules: Mapping[str, nn.Module]) -> dict[str, Run]:
    """Run a model and return the runs of chosen modules within it, by the given names."""
    runs: dict[str, Run] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            # With activation checkpointing a module runs again in the backward pass; the first run is recorded.
            runs.setdefault(name, Run(inputs[0], output))

        return hook

    with ExitStack() as stack:
        for name, module in modules.items():
            stack.callback(module.register_forward_hook(keep(name)).remove)
        model(images)
    return runs


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Set a model to evaluation mode within the context, and restore the mode of each module."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def check_image(image: Tensor) -> None:
    """Raise a ValueError unless ``image`` is one preprocessed image (1, C, H, W) or (C, H, W), finite."""
    if image.ndim not in (3, 4) or (image.ndim == 4 and image.shape[0] != 1):
        raise ValueError(f'expected one image (1, C, H, W) or (C, H, W), got shape {tuple(image.shape)}.')
    if not torch.isfinite(image).all():
        raise ValueError('the image holds values that are not finite.')
