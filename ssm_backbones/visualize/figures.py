"""What ``tools/visualize.py`` does: figures of a config's backbone, with the weights of a checkpoint, as PNG files."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from torch import Tensor

from ssm_backbones.backbones.base import SSMBackbone
from ssm_backbones.export.models import FeatureExtractor, build_extractor
from ssm_backbones.export.pictures import MAX_PIXELS, SUFFIXES, Picture, find_pictures
from ssm_backbones.export.store import file_name
from ssm_backbones.preflight import CommandError, check_checkpoint, check_device
from ssm_backbones.runner import load_config
from ssm_backbones.visualize.activation import activation_maps
from ssm_backbones.visualize.drawing import draw_activation_maps, draw_receptive_fields, draw_scan_response
from ssm_backbones.visualize.pictures import Given, PictureReader
from ssm_backbones.visualize.receptive_field import ReceptiveField, receptive_field
from ssm_backbones.visualize.response import scan_response
from ssm_backbones.visualize.stages import resolve_stage, spread_stages, stage_name, stage_stride

_UNITS = {'norm': "norm of the pixel's features", 'mean': 'mean magnitude of the features', 'pca': ''}


@dataclass(frozen=True)
class VisualizeOptions:
    """What ``tools/visualize.py`` is told.

    Attributes:
        figure: ``'erf'``, ``'activation'`` or ``'scan-response'``.
        config: The config file.
        checkpoint: The checkpoint of its model, or of the backbone alone, official ones too.
        img: Pictures, folders, patterns, files of COCO annotations, or splits of the config.
        out: The folder to write to.
        limit: How many pictures to take, from the first on; all by default.
        size: Height and width that pictures are resized to, instead of what the config's pipeline does.
        max_pixels: Larger pictures are refused.
        device: ``'cpu'``, ``'cuda'`` or ``'cuda:1'``; by default a GPU where there is one.
        cfg_options: Values that replace the config's, by dotted key.
        stage: Of ``erf`` and ``scan-response``: the stage, or block of a V2M of one resolution.
        seed: Of ``erf``: of the random weights.
        stages: Of ``activation``: the stages.
        kind: Of ``activation``: see :func:`~ssm_backbones.visualize.activation_maps`.
        channels: Of ``activation``: channels to draw instead.
        block: Of ``scan-response``: the block of the stage.
        point: Of ``scan-response``: column and row of a pixel of the picture as the model is given it; by default the
            middle.
        sense: Of ``scan-response``: ``'reads'`` or ``'feeds'``.
    """

    figure: str
    config: str
    checkpoint: str
    img: Sequence[str]
    out: str
    limit: int | None = None
    size: Sequence[int] | None = None
    max_pixels: int = MAX_PIXELS
    device: str | None = None
    cfg_options: Mapping[str, Any] = field(default_factory=dict)
    stage: int | None = None
    seed: int = 0
    stages: Sequence[int] | None = None
    kind: str = 'norm'
    channels: Sequence[int] | None = None
    block: int | None = None
    point: Sequence[int] | None = None
    sense: str = 'reads'


def visualize(options: VisualizeOptions) -> Iterator[Path]:
    """Draw as the options say: one figure of receptive fields for all pictures, one of the others for each.

    Yields:
        The path of each figure, once it is written.

    Raises:
        CommandError: If the config, the checkpoint, a picture, an option or the folder does not allow it.
    """
    cfg = load_config(options.config, options.cfg_options)
    check_checkpoint(options.checkpoint, 'checkpoint')
    device = check_device(options.device)
    pictures = _pictures(options, cfg)
    names = _names(pictures)
    size = None if options.size is None else (options.size[0], options.size[1])
    with _in_one_line():
        folder = _folder(options.out)
        if options.figure == 'erf':
            suffix = '' if options.stage is None else f'-stage{options.stage}'
            path = folder / f'{Path(options.config).stem}_erf{suffix}.png'
            draw_erf_before_and_after(cfg, options.checkpoint, [picture.path for picture in pictures], path,
                                      stage=options.stage, size=size, seed=options.seed, device=device,
                                      max_pixels=options.max_pixels)
            yield path
            return
        extractor = build_extractor(cfg, options.checkpoint)
        backbone = _backbone(extractor).to(device)
        read = PictureReader(cfg, extractor, size, options.max_pixels)
        draw = {'activation': _draw_activation, 'scan-response': _draw_response}[options.figure]
        for picture, name in zip(pictures, names, strict=True):
            stem = folder / f'{_title(cfg, backbone)}_{name}'
            given = read(picture.path)
            yield draw(backbone, given._replace(image=given.image.to(device)), stem, _title(cfg, backbone), options)


def draw_erf_before_and_after(cfg: Config, checkpoint: str | os.PathLike[str],
                              pictures: Sequence[str | os.PathLike[str]], path: str | os.PathLike[str], *,
                              stage: int | None = None, size: tuple[int, int] | None = None, seed: int = 0,
                              device: str | torch.device = 'cpu',
                              max_pixels: int = MAX_PIXELS) -> tuple[ReceptiveField, ReceptiveField]:
    """Draw the effective receptive fields of a config's backbone with random and with trained weights into a PNG file.

    Args:
        cfg: A config of mmpretrain, mmdet or mmseg.
        checkpoint: The trained weights: of the model, or of the backbone alone.
        pictures: Files of pictures, over which the fields are averaged.
        path: Where the figure goes; its folder has to exist.
        stage: Number of the stage, or of the block of a V2M of one resolution; negative ones count from the end, None
            is the last one.
        size: Height and width that the pictures are resized to; None leaves the config's pipeline as it is, whose
            pictures then have to be of one size.
        seed: Of the random weights.
        device: Where to compute.
        max_pixels: Larger pictures are refused.

    Returns:
        The fields before and after training.

    Raises:
        CommandError: If the checkpoint does not fit, a picture cannot be read, the sizes differ, or the figure cannot
            be written.
    """
    with _in_one_line():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            untrained = build_extractor(cfg, None)
            trained = build_extractor(cfg, os.fspath(checkpoint))
        backbones = [_backbone(each).to(device) for each in (untrained, trained)]
        number = resolve_stage(backbones[0], stage)
        read = PictureReader(cfg, untrained, size, max_pixels)
        images = [read(picture).image.to(device) for picture in pictures]
        for picture, image in zip(pictures, images, strict=True):
            if image.shape != images[0].shape:
                raise CommandError(
                    f'{pictures[0]} and {picture} reach the model in different sizes, {_size(images[0])} and '
                    f'{_size(image)}, and a receptive field is averaged over pictures of one; resize them all with '
                    '--size HEIGHT WIDTH.'
                )
        before, after = (receptive_field(backbone, images, number) for backbone in backbones)
        count = f'mean of {len(images)} pictures' if len(images) > 1 else 'one picture'
        place = f'{stage_name(backbones[0], number)}, stride {stage_stride(backbones[0], number)}'
        heading = (f'Effective receptive field: {_title(cfg, backbones[0])}\n{place}; '
                   f'{count} of {_size(images[0])}')
        draw_receptive_fields({'before training': before, 'after training': after}, path, heading)
    return before, after


def _draw_activation(backbone: SSMBackbone, given: Given, stem: Path, title: str, options: VisualizeOptions) -> Path:
    numbers = [resolve_stage(backbone, stage) for stage in options.stages or spread_stages(backbone)]
    maps = activation_maps(backbone, given.image, numbers, options.kind, options.channels)
    path = stem.with_name(f'{stem.name}_activation.png')
    named = {stage_name(backbone, number): value for number, value in maps.items()}
    what = 'channels' if options.channels is not None else {
        'norm': 'norm over the channels', 'mean': 'mean magnitude', 'pca': 'three principal components as colours',
    }[options.kind]
    draw_activation_maps(given.picture, named, [stage_stride(backbone, number) for number in maps], path,
                         f'Activation maps: {title}\n{what}',
                         'value' if options.channels is not None else _UNITS[options.kind], options.channels)
    return path


def _draw_response(backbone: SSMBackbone, given: Given, stem: Path, title: str, options: VisualizeOptions) -> Path:
    pixel = None if options.point is None else (options.point[1], options.point[0])
    found = scan_response(backbone, given.image, options.stage, options.block, pixel, options.sense)
    stage = stage_name(backbone, found.stage)
    blocks = len(backbone.stages[found.stage].blocks)
    block = f', block {found.block}' if blocks > 1 else ''
    path = stem.with_name(f'{stem.name}_scan-response-{(stage + block).replace(", ", "-").replace(" ", "")}.png')
    sense = 'what the marked pixel reads of the others' if found.sense == 'reads' else (
        'what the marked pixel feeds to the others')
    draw_scan_response(given.picture, found, stage_stride(backbone, found.stage), path,
                       f'Scan response: {title}\n{stage}{block}: {sense}')
    return path


def _pictures(options: VisualizeOptions, cfg: Config) -> list[Picture]:
    if options.limit is not None and options.limit < 1:
        raise CommandError(f'--limit must be at least 1, got {options.limit}.')
    if options.max_pixels < 1:
        raise CommandError(f'--max-pixels must be at least 1, got {options.max_pixels}.')
    return [picture for given in options.img for picture in find_pictures(given, cfg)][:options.limit]


def _names(pictures: Sequence[Picture]) -> list[str]:
    """What the pictures are called in the names of figures."""
    names: dict[str, str] = {}
    for picture in pictures:
        stem, suffix = os.path.splitext(picture.id)
        name = file_name(stem if suffix.lower() in SUFFIXES else picture.id).replace('/', '_')
        if name in names:
            raise CommandError(f'{names[name]} and {picture.path} would be drawn into one file, as both are called '
                               f'{name}; draw them one after the other, with another --out.')
        names[name] = picture.path
    return list(names)


def _folder(out: str) -> Path:
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f'--out {out} is no folder that can be made: {error}') from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise CommandError(f'--out {out} is a folder that cannot be written to.')
    return folder


def _backbone(extractor: FeatureExtractor) -> SSMBackbone:
    backbone = extractor.backbone
    if not isinstance(backbone, SSMBackbone):
        raise CommandError(f"the config's backbone is a {type(backbone).__name__}; figures are of VMamba, V2M and "
                           'Mamba2D alone.')
    return backbone


def _title(cfg: Config, backbone: SSMBackbone) -> str:
    return Path(cfg.filename).stem if cfg.filename else type(backbone).__name__


def _size(image: Tensor) -> str:
    return f'{image.shape[3]}x{image.shape[2]}'


@contextmanager
def _in_one_line() -> Iterator[None]:
    """Turn what the parts raise for bad arguments, files and too little memory into a :class:`CommandError`."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise CommandError('a picture does not fit into the memory of the GPU; resize it with --size.') from error
    except OSError as error:
        raise CommandError(f'a file cannot be read or written: {error}') from error
    except ValueError as error:
        raise CommandError(str(error)) from error
