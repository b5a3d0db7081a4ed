"""Draw figures of a config's backbone with the weights of a checkpoint as PNG files, for ``tools/visualize.py``."""

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

from ssm_backbones.apis.checks import check_checkpoint, check_device
from ssm_backbones.apis.config import load_config
from ssm_backbones.apis.images import MAX_PIXELS, SUFFIXES, InputImage, find_images
from ssm_backbones.apis.model import FeatureExtractor, build_extractor
from ssm_backbones.backbones.base import SSMBackbone
from ssm_backbones.utils.errors import CommandError
from ssm_backbones.utils.files import file_name
from ssm_backbones.utils.memory import explain_lack_of_memory
from ssm_backbones.visualization.activation import activation_maps
from ssm_backbones.visualization.plots import draw_activation_maps, draw_receptive_fields, draw_scan_response
from ssm_backbones.visualization.reading import Given, ImageReader
from ssm_backbones.visualization.receptive_field import ReceptiveField, receptive_field
from ssm_backbones.visualization.scan_response import scan_response
from ssm_backbones.visualization.stages import resolve_stage, spread_stages

_UNITS = {'norm': "norm of the pixel's features", 'mean': 'mean magnitude of the features', 'pca': ''}


@dataclass(frozen=True)
class VisualizeOptions:
    """Options of ``tools/visualize.py``.

    Attributes:
        figure: ``'erf'``, ``'activation'`` or ``'scan-response'``.
        config: The config file.
        checkpoint: The checkpoint of its model, or of the backbone alone, official ones too.
        img: Images, folders, patterns, files of COCO annotations, or splits of the config.
        out: The folder to write to, or for a single figure a file name that ends in .png.
        limit: Maximum number of images, from the first on; all by default.
        size: Height and width that images are resized to, instead of the config's resizing.
        max_pixels: Larger images are rejected.
        device: ``'cpu'``, ``'cuda'`` or ``'cuda:1'``; by default a GPU if available.
        cfg_options: Values that replace the config's, by dotted key.
        stage: For ``erf`` and ``scan-response``: the stage, or the block of a plain V2M.
        seed: For ``erf``: seed of the random weights.
        stages: For ``activation``: the stages.
        kind: For ``activation``: see :func:`~ssm_backbones.visualization.activation_maps`.
        channels: For ``activation``: channels to draw instead.
        block: For ``scan-response``: the block of the stage.
        point: For ``scan-response``: column and row of a pixel of the model's input; by default the centre.
        sense: For ``scan-response``: ``'reads'`` or ``'feeds'``.
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
    """Draw one figure of receptive fields for all images, or one figure of another kind for each image.

    Yields:
        The path of each figure, once it is written.

    Raises:
        CommandError: If the config, the checkpoint, an image, an option or the folder does not allow it.
    """
    cfg = load_config(options.config, options.cfg_options)
    check_checkpoint(options.checkpoint, 'checkpoint')
    device = check_device(options.device)
    images = _images(options, cfg)
    names = _names(images)
    size = None if options.size is None else (options.size[0], options.size[1])
    file = _file(options.out, 1 if options.figure == 'erf' else len(images))
    with _in_one_line():
        folder = _folder(options.out if file is None else os.path.dirname(options.out) or '.')
        if options.figure == 'erf':
            suffix = '' if options.stage is None else f'-stage{options.stage}'
            path = file or folder / f'{Path(options.config).stem}_erf{suffix}.png'
            draw_erf_before_and_after(
                cfg,
                options.checkpoint,
                [image.path for image in images],
                path,
                stage=options.stage,
                size=size,
                seed=options.seed,
                device=device,
                max_pixels=options.max_pixels,
            )
            yield path
            return
        extractor = build_extractor(cfg, options.checkpoint)
        backbone = _backbone(extractor).to(device)
        read = ImageReader(cfg, extractor, size, options.max_pixels)
        draw = {'activation': _draw_activation, 'scan-response': _draw_response}[options.figure]
        for image, name in zip(images, names, strict=True):
            stem = folder / f'{_title(cfg, backbone)}_{name}'
            given = read(image.path)
            given = given._replace(image=given.image.to(device))
            yield draw(backbone, given, stem, file, _title(cfg, backbone), options)


def draw_erf_before_and_after(
    cfg: Config,
    checkpoint: str | os.PathLike[str],
    images: Sequence[str | os.PathLike[str]],
    path: str | os.PathLike[str],
    *,
    stage: int | None = None,
    size: tuple[int, int] | None = None,
    seed: int = 0,
    device: str | torch.device = 'cpu',
    max_pixels: int = MAX_PIXELS,
) -> tuple[ReceptiveField, ReceptiveField]:
    """Draw the effective receptive fields of a config's backbone with random and with trained weights into a PNG file.

    Args:
        cfg: A config of mmpretrain, mmdet or mmseg.
        checkpoint: The trained weights: of the model, or of the backbone alone.
        images: Files of images, over which the fields are averaged.
        path: Where the figure goes; its folder has to exist.
        stage: Number of the stage, or of the block of a V2M of one resolution; negative ones count from the end, None
            is the last one.
        size: Height and width that the images are resized to; None leaves the config's pipeline as it is, whose
            images then have to be of one size.
        seed: Of the random weights.
        device: Where to compute.
        max_pixels: Larger images are refused.

    Returns:
        The fields before and after training.

    Raises:
        CommandError: If the checkpoint does not match, an image cannot be read, the sizes differ, or the figure cannot
            be written.
    """
    with _in_one_line():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            untrained = build_extractor(cfg, None)
            trained = build_extractor(cfg, os.fspath(checkpoint))
        backbones = [_backbone(each).to(device) for each in (untrained, trained)]
        number = resolve_stage(backbones[0], stage)
        read = ImageReader(cfg, untrained, size, max_pixels)
        given = [read(path).image.to(device) for path in images]
        for file, image in zip(images, given, strict=True):
            if image.shape != given[0].shape:
                raise CommandError(
                    f'{images[0]} and {file} reach the model in different sizes, {_size(given[0])} and '
                    f'{_size(image)}, and a receptive field is averaged over images of one; resize them all with '
                    'size.'
                )
        before, after = (receptive_field(backbone, given, number) for backbone in backbones)
        count = f'mean of {len(given)} images' if len(given) > 1 else 'one image'
        place = f'{backbones[0].stage_names[number]}, stride {backbones[0].stage_strides[number]}'
        heading = f'Effective receptive field: {_title(cfg, backbones[0])}\n{place}; {count} of {_size(given[0])}'
        draw_receptive_fields({'before training': before, 'after training': after}, path, heading)
    return before, after


def _draw_activation(
    backbone: SSMBackbone, given: Given, stem: Path, file: Path | None, title: str, options: VisualizeOptions
) -> Path:
    numbers = [resolve_stage(backbone, stage) for stage in options.stages or spread_stages(backbone)]
    maps = activation_maps(backbone, given.image, numbers, options.kind, options.channels)
    path = file or stem.with_name(f'{stem.name}_activation.png')
    named = {backbone.stage_names[number]: value for number, value in maps.items()}
    what = (
        'channels'
        if options.channels is not None
        else {
            'norm': 'norm over the channels',
            'mean': 'mean magnitude',
            'pca': 'three principal components as colours',
        }[options.kind]
    )
    draw_activation_maps(
        given.shown,
        named,
        [backbone.stage_strides[number] for number in maps],
        path,
        f'Activation maps: {title}\n{what}',
        'value' if options.channels is not None else _UNITS[options.kind],
        options.channels,
    )
    return path


def _draw_response(
    backbone: SSMBackbone, given: Given, stem: Path, file: Path | None, title: str, options: VisualizeOptions
) -> Path:
    pixel = None if options.point is None else (options.point[1], options.point[0])
    found = scan_response(backbone, given.image, options.stage, options.block, pixel, options.sense)
    stage = backbone.stage_names[found.stage]
    blocks = len(backbone.stages[found.stage].blocks)
    block = f', block {found.block}' if blocks > 1 else ''
    place = (stage + block).replace(', ', '-').replace(' ', '')
    path = file or stem.with_name(f'{stem.name}_scan-response-{place}.png')
    sense = (
        'what the marked pixel reads of the others'
        if found.sense == 'reads'
        else ('what the marked pixel feeds to the others')
    )
    draw_scan_response(
        given.shown,
        found,
        backbone.stage_strides[found.stage],
        path,
        f'Scan response: {title}\n{stage}{block}: {sense}',
    )
    return path


def _images(options: VisualizeOptions, cfg: Config) -> list[InputImage]:
    if options.limit is not None and options.limit < 1:
        raise CommandError(f'limit must be at least 1, got {options.limit}.')
    if options.max_pixels < 1:
        raise CommandError(f'max_pixels must be at least 1, got {options.max_pixels}.')
    return [image for given in options.img for image in find_images(given, cfg)][: options.limit]


def _names(images: Sequence[InputImage]) -> list[str]:
    """Return names of the images, for the names of figures."""
    names: dict[str, str] = {}
    for image in images:
        stem, suffix = os.path.splitext(image.id)
        name = file_name(stem if suffix.lower() in SUFFIXES else image.id).replace('/', '_')
        if name in names:
            raise CommandError(
                f'{names[name]} and {image.path} would be drawn into one file, as both are called '
                f'{name}; draw them one after the other, with another folder as out.'
            )
        names[name] = image.path
    return list(names)


def _file(out: str, figures: int) -> Path | None:
    """Take ``out`` as the file of the only figure, where it is called like an image; None where it is a folder."""
    suffix = os.path.splitext(out)[1].lower()
    if suffix not in SUFFIXES or os.path.isdir(out):
        return None
    if suffix != '.png':
        raise CommandError(f'out {out}: figures are PNG files; name a file that ends in .png, or a folder.')
    if figures > 1:
        raise CommandError(
            f'out {out} is the name of one file, and {figures} figures are drawn, one for each image; name a folder.'
        )
    return Path(out)


def _folder(out: str) -> Path:
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f'out {out} is no folder that can be made: {error}') from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise CommandError(f'out {out} is a folder that cannot be written to.')
    return folder


def _backbone(extractor: FeatureExtractor) -> SSMBackbone:
    backbone = extractor.backbone
    if not isinstance(backbone, SSMBackbone):
        raise CommandError(
            f"the config's backbone is a {type(backbone).__name__}; figures are of VMamba, V2M and Mamba2D alone."
        )
    return backbone


def _title(cfg: Config, backbone: SSMBackbone) -> str:
    return Path(cfg.filename).stem if cfg.filename else type(backbone).__name__


def _size(image: Tensor) -> str:
    return f'{image.shape[3]}x{image.shape[2]}'


@contextmanager
def _in_one_line() -> Iterator[None]:
    """Convert errors of bad arguments, files and insufficient memory to a :class:`CommandError`."""
    try:
        with explain_lack_of_memory('an image', 'resize it with size'):
            yield
    except OSError as error:
        raise CommandError(f'a file cannot be read or written: {error}') from error
    except ValueError as error:
        raise CommandError(str(error)) from error
