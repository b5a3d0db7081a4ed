"""Find the images that an argument stands for, and check that they can be read."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from mmengine.config import Config
from mmengine.registry import DATASETS, DefaultScope

from ssm_backbones.apis.checks import check_paths, leaf_datasets
from ssm_backbones.compat import without_pil_limit
from ssm_backbones.utils.errors import CommandError

SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp', '.ppm', '.pgm', '.jp2', '.npy')
SPLITS = ('train', 'val', 'test')
MAX_PIXELS = 100_000_000


@dataclass(frozen=True)
class InputImage:
    """One image to export.

    Attributes:
        id: Unique identifier: the data set's own id, or the path relative to the given folder.
        path: Path of the image file.
        extra: Annotations from a data set: ``label`` (class of the whole image), ``label_map`` (path).
    """

    id: str
    path: str
    extra: Mapping[str, Any] = field(default_factory=dict)


class UnreadableImage(Exception):
    """An image that cannot be used; the message gives the reason."""


def find_images(given: str, cfg: Config, image_folder: str | None = None) -> list[InputImage]:
    """Find the images that an argument stands for.

    Args:
        given: ``train``, ``val`` or ``test``, a split of the config; an image; a folder, searched for images below
            it; a pattern such as ``'shots/*.png'`` (``**`` for any folders); or a file of COCO annotations (.json).
        cfg: The config, for the splits.
        image_folder: Folder of the images of a COCO file. By default a folder named after the end of the file's name,
            next to the file or to its folder (``val2017`` for ``annotations/instances_val2017.json``), else the file's
            own folder.

    Raises:
        CommandError: If no image is found, or two have the same id.
    """
    if image_folder is not None and not given.endswith('.json'):
        raise CommandError(f'image_folder goes with a COCO file (.json), not with {given}.')
    if given in SPLITS:
        images = _of_split(given, cfg)
    elif given.endswith('.json') and os.path.isfile(given):
        images = _of_coco(Path(given), image_folder)
    elif os.path.isfile(given):
        images = [InputImage(os.path.basename(given), given)]
    elif os.path.isdir(given):
        images = _of_folder(Path(given))
    elif glob.has_magic(given):
        images = _of_pattern(given)
    else:
        raise CommandError(
            f'{given} is no image, folder, pattern, COCO file or split ({", ".join(SPLITS)}) that exists.'
        )
    if not images:
        raise CommandError(f'{given} holds no images; looked for {", ".join(SUFFIXES)}.')
    _check_ids(images)
    return images


def test_pipeline(cfg: Config) -> list[dict[str, Any]]:
    """Return the config's test transforms, without those that load annotations.

    Raises:
        CommandError: If the config has no test or validation pipeline.
    """
    for mode in ('test', 'val'):
        loader = cfg.get(f'{mode}_dataloader')
        dataset = next((leaf for _, leaf in leaf_datasets(loader.dataset)), None) if loader is not None else None
        if dataset is not None and dataset.get('pipeline'):
            pipeline = [dict(step) for step in deepcopy(dataset.pipeline)]
            return [step for step in pipeline if 'Annotation' not in str(step['type'])]
    raise CommandError('the config has no test_dataloader with a pipeline, which says how images are read.')


test_pipeline.__test__ = False  # type: ignore[attr-defined]


def check_readable(path: str, max_pixels: int) -> None:
    """Reject truncated files, which decoders accept silently, and images that are too large to process.

    Arrays (.npy) and the TIFFs that Pillow cannot open, such as those of five bands, are checked for their size alone;
    the config's own loader decodes them.

    Raises:
        UnreadableImage: If the image cannot be used. The message gives the reason.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        data = Path(path).read_bytes()
        kind = ''
        if path.lower().endswith('.npy'):
            height, width = _array_size(np.load(path, mmap_mode='r').shape)
        else:
            try:
                with without_pil_limit(), Image.open(path) as image:
                    kind, (width, height) = image.format or '', image.size
            except UnidentifiedImageError:
                height, width = _tiff_size(path, data)
    except FileNotFoundError:
        raise UnreadableImage('no such file') from None
    except (OSError, ValueError, EOFError) as error:
        raise UnreadableImage(str(error) if data else 'the file is empty') from error
    if width * height > max_pixels:
        raise UnreadableImage(f'too large: {width}x{height} pixels are more than {max_pixels} (max_pixels)')
    # Within the coded image, neither marker can occur; the first may also end a thumbnail before it.
    cut_off = (kind == 'JPEG' and data.rfind(b'\xff\xd9') < data.rfind(b'\xff\xda')) or (
        kind == 'PNG' and b'IEND' not in data[-64:]
    )
    if cut_off:
        raise UnreadableImage('the file is cut off: its end is missing')


def _array_size(shape: Sequence[int]) -> tuple[int, int]:
    """Return height and width of an array whose bands, if it has any, are the shortest side, first or last."""
    if len(shape) == 2:
        return shape[0], shape[1]
    if len(shape) != 3:
        raise ValueError(f'no image: an array of shape {tuple(shape)}')
    return (shape[1], shape[2]) if shape[0] < shape[2] else (shape[0], shape[1])


def _tiff_size(path: str, data: bytes) -> tuple[int, int]:
    if data[:4] not in (b'II*\0', b'MM\0*', b'II+\0', b'MM\0+'):
        raise ValueError('no image, or damaged')
    try:
        import tifffile
    except ImportError as error:
        raise ValueError('a TIFF that Pillow cannot open; tifffile reads more of them: pip install tifffile') from error
    try:
        with tifffile.TiffFile(path) as file:
            return _array_size(file.series[0].shape)
    except (tifffile.TiffFileError, IndexError, KeyError) as error:
        raise ValueError(f'a damaged TIFF ({error})') from error


def _of_split(split: str, cfg: Config) -> list[InputImage]:
    loader = cfg.get(f'{split}_dataloader')
    if loader is None:
        raise CommandError(f'the config has no {split}_dataloader.')
    check_paths(cfg, (split,))
    images = []
    for _, settings in leaf_datasets(loader.dataset):
        settings = deepcopy(settings)
        settings.pipeline = []
        with DefaultScope.overwrite_default_scope(cfg.default_scope):
            dataset = DATASETS.build(settings)
        paths = [dataset.get_data_info(index) for index in range(len(dataset))]
        if any('img_path' not in info for info in paths):
            raise CommandError(f'the {split} data set, a {settings.type}, has no image files.')
        _check_within(dataset, paths)
        root = os.path.commonpath([os.path.dirname(os.path.abspath(info['img_path'])) for info in paths] or ['/'])
        for info in paths:
            relative = PurePosixPath(Path(os.path.abspath(info['img_path'])).relative_to(root))
            extra = {}
            if info.get('gt_label') is not None:
                extra['label'] = _plain_label(info['gt_label'])
            if info.get('seg_map_path') is not None:
                extra['label_map'] = info['seg_map_path']
            images.append(InputImage(str(info.get('img_id', relative)), info['img_path'], extra))
    return images


def _check_within(dataset: Any, infos: Sequence[Mapping[str, Any]]) -> None:
    """Reject images that an annotation file names outside of the data set's folder (``../``, absolute paths)."""
    prefix = getattr(dataset, 'data_prefix', None)
    given = next((prefix[key] for key in ('img', 'img_path') if prefix.get(key)), '') if prefix else ''
    if not given:
        return
    folder = os.path.abspath(given)
    for info in infos:
        # Links are the user's own.
        if os.path.commonpath([folder, os.path.abspath(info['img_path'])]) != folder:
            raise CommandError(
                f'the annotations name the image {info["img_path"]}, which is not in {folder}. Name images by their '
                'paths within their folder (data_prefix).'
            )


def _plain_label(label: Any) -> Any:
    return label.tolist() if hasattr(label, 'tolist') else label


def _of_coco(path: Path, image_folder: str | None) -> list[InputImage]:
    try:
        images = json.loads(path.read_text(encoding='utf-8'))['images']
        named = [(str(image['id']), image['file_name']) for image in images]
    except (ValueError, KeyError, TypeError) as error:
        raise CommandError(f'{path} is no file of COCO annotations ({type(error).__name__}: {error}).') from error
    if image_folder is not None:
        folder = Path(image_folder)
        if not folder.is_dir():
            raise CommandError(f'image_folder {folder} does not exist.')
    else:
        name = path.stem.rpartition('_')[2]
        places = (path.parent / name, path.parent.parent / name, path.parent.parent / 'images', path.parent)
        folder = next(place for place in places if place.is_dir())
    for _, name in named:
        if not isinstance(name, str) or os.path.isabs(name) or os.path.normpath(name).split(os.sep)[0] == '..':
            raise CommandError(
                f'{path} names the image {name!r}, which is not in {folder}. Name images by their paths within their '
                'folder (image_folder).'
            )
    if named and not any((folder / name).is_file() for _, name in named):
        raise CommandError(f'none of the images of {path} is in {folder}; name their folder with image_folder.')
    return [InputImage(id, str(folder / name)) for id, name in named]


def _of_folder(folder: Path) -> list[InputImage]:
    files = sorted(path for path in folder.rglob('*') if path.suffix.lower() in SUFFIXES and path.is_file())
    return [InputImage(path.relative_to(folder).as_posix(), str(path)) for path in files]


def _of_pattern(pattern: str) -> list[InputImage]:
    files = sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))
    if not files:
        return []
    root = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in files])
    return [InputImage(Path(os.path.abspath(path)).relative_to(root).as_posix(), path) for path in files]


def _check_ids(images: Sequence[InputImage]) -> None:
    seen: dict[str, str] = {}
    for image in images:
        if image.id in seen:
            raise CommandError(f'{seen[image.id]} and {image.path} have the same id, {image.id!r}.')
        seen[image.id] = image.path
