"""Boxes and masks in COCO's, YOLO's or Pascal VOC's format. The latter two are converted to COCO's by supervision."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmengine.fileio import load

from ssm_backbones.project.sources import TRAIN_NAMES, VAL_NAMES, Found, child, sample, split
from ssm_backbones.utils.errors import CommandError
from ssm_backbones.utils.files import write_atomic, writing

_IMAGE_FOLDERS = ('images', 'JPEGImages', 'imgs', 'img')


@dataclass
class _Part:
    """Annotations in COCO's format and the folder of their images."""

    images: Path
    file: Path
    content: dict[str, Any]


def find_detection(data: Path, converted: Path, seed: int) -> Found:
    """Find the annotations in a folder.

    Args:
        data: The folder: with COCO JSONs for training and validation, or one that is divided; YOLO's ``data.yaml``
            with images and labels; or Pascal VOC's ``Annotations`` and ``JPEGImages``.
        converted: Folder for what is converted or divided; created if needed.
        seed: Of the division, where there is no validation set.

    Raises:
        CommandError: If no annotations are found or they cannot be read.
    """
    kind, parts = next(
        (
            (kind, parts)
            for kind, read in (('COCO', _coco_parts), ('YOLO', _yolo_parts), ('Pascal VOC', _voc_parts))
            if (parts := read(data, converted))
        ),
        ('', []),
    )
    if not parts:
        raise CommandError(
            f'data {data} has no annotations that are known: looked for COCO (.json with images, annotations and '
            'categories), YOLO (data.yaml with names, images/ and labels/) and Pascal VOC (Annotations/*.xml).'
        )
    notes = []
    if len(parts) == 1:
        parts = _divided(parts[0], converted, seed)
        notes.append(
            f'no validation set was found: {len(parts[1].content["images"])} of '
            f'{sum(len(part.content["images"]) for part in parts)} images were put aside (seed {seed}), see {converted}'
        )
    train = parts[0]
    classes = _classes(train, notes)
    val = _aligned(parts[1], train, classes, converted, notes)
    objects = [each for part in parts for each in part.content['annotations'] if not each.get('iscrowd')]
    with_masks = sum(bool(each.get('segmentation')) for each in objects)
    if 0 < with_masks < len(objects):
        notes.append(f'{len(objects) - with_masks} of {len(objects)} objects have no mask: boxes alone are learnt')
    return Found(
        kind=kind,
        classes=classes,
        train=_settings(train),
        val=_settings(val),
        images=len(train.content['images']),
        val_images=len(val.content['images']),
        examples=sample([train.images / image['file_name'] for image in train.content['images']]),
        masks=bool(objects) and with_masks == len(objects),
        notes=notes,
    )


def _settings(part: _Part) -> dict[str, Any]:
    return dict(ann_file=str(part.file), data_prefix=dict(img=f'{part.images}{os.sep}'))


def _classes(train: _Part, notes: list[str]) -> tuple[str, ...]:
    used = {each['category_id'] for each in train.content['annotations']}
    # mmdet numbers classes in the order of the file, whatever the config's.
    categories = train.content['categories']
    unused = [each['name'] for each in categories if each['id'] not in used]
    if unused:
        notes.append(f'categories without a training object are left out: {", ".join(unused)}')
    names = tuple(each['name'] for each in categories if each['id'] in used)
    if not names:
        raise CommandError(f'{train.file} has no object of any category.')
    return names


def _aligned(part: _Part, train: _Part, classes: tuple[str, ...], converted: Path, notes: list[str]) -> _Part:
    """Return validation data with the categories of the training data in their order: mmdet numbers classes by it."""
    names = {each['id']: each['name'] for each in part.content['categories']}
    strange = {names[each['category_id']] for each in part.content['annotations']} - set(classes)
    if strange:
        notes.append(f'{part.file} has objects of categories that are not trained: {", ".join(sorted(strange))}')
    if tuple(name for name in names.values() if name in classes) == classes:
        return part
    ids = {each['name']: each['id'] for each in train.content['categories']}
    annotations = [
        {**each, 'category_id': ids[names[each['category_id']]]}
        for each in part.content['annotations']
        if names[each['category_id']] in ids
    ]
    content = {**part.content, 'categories': train.content['categories'], 'annotations': annotations}
    file = converted / 'val.json'
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, json.dumps(content))
    return _Part(part.images, file, content)


def _coco_parts(data: Path, converted: Path) -> list[_Part]:
    found = []
    for path in sorted([*data.glob('*.json'), *data.glob('*/*.json')]):
        try:
            content = json.loads(path.read_text(encoding='utf-8'))
        except (ValueError, OSError):
            continue
        if isinstance(content, dict) and {'images', 'annotations', 'categories'} <= content.keys():
            found.append((path, content))
    if not found:
        return []
    chosen = [_of_split(found, TRAIN_NAMES), _of_split(found, VAL_NAMES)]
    if len(found) == 1:
        chosen = [found[0], None]
    if chosen[0] is None:
        raise CommandError(
            f'data {data} has {len(found)} COCO files, and none is named after training: '
            f'{", ".join(str(path.relative_to(data)) for path, _ in found)}. Name them *train*.json and *val*.json.'
        )
    return [_Part(_image_folder(data, *each), each[0], each[1]) for each in chosen if each is not None]


def _of_split(found: list[tuple[Path, dict]], names: tuple[str, ...]) -> tuple[Path, dict] | None:
    """Return the file whose name or folder names a split, the earlier names before the later ones."""
    for name in names:
        for path, content in found:
            if name in path.stem.lower() or path.parent.name.lower() == name:
                return path, content
    return None


def _image_folder(data: Path, path: Path, content: dict[str, Any]) -> Path:
    if not content['images']:
        raise CommandError(f'{path} names no images.')
    first = content['images'][0]['file_name']
    split_name = path.stem.rpartition('_')[2]
    bases = [path.parent, path.parent.parent, data]
    folders = [
        folder
        for base in bases
        for folder in (base / split_name, base / 'images' / split_name, base / path.stem, base / 'images', base)
    ]
    folder = next((folder for folder in folders if (folder / first).is_file()), None)
    if folder is None:
        raise CommandError(
            f'{path} names the image {first}, which is in none of {", ".join(dict.fromkeys(map(str, folders)))}.'
        )
    return folder.resolve()


def _yolo_parts(data: Path, converted: Path) -> list[_Part]:
    for path in sorted([*data.glob('*.yaml'), *data.glob('*.yml')]):
        try:
            content = load(str(path))
        except Exception as error:
            # The parser has errors of its own.
            raise CommandError(f'{path} cannot be read: {error}') from error
        if isinstance(content, dict) and 'names' in content:
            return list(_yolo_splits(data, path, content, converted))
    return []


def _yolo_splits(data: Path, path: Path, content: dict[str, Any], converted: Path) -> Iterator[_Part]:
    for keys, fallback in ((('train',), TRAIN_NAMES), (('val', 'valid', 'test'), VAL_NAMES)):
        given = next((content[key] for key in keys if content.get(key)), None)
        images = _yolo_images(data, content.get('path'), given, fallback)
        if images is None:
            if keys[0] == 'train':
                raise CommandError(
                    f'{path}: train is {given!r}, no folder of images that exists beside it. Name a folder there.'
                )
            continue
        labels = Path(*[{'images': 'labels'}.get(part, part) for part in images.parts])
        if labels == images or not labels.is_dir():
            raise CommandError(f'{path}: no labels of {images}; expected them in {labels}.')

        def read(supervision: Any, images: Path = images, labels: Path = labels) -> Any:
            return supervision.DetectionDataset.from_yolo(str(images), str(labels), str(path))

        yield _convert(read, images, converted / f'{keys[0]}.json')


def _yolo_images(data: Path, root: Any, given: Any, names: tuple[str, ...]) -> Path | None:
    """Return the folder of a split's images; an exported data set's paths are often those of another machine."""
    if isinstance(given, (list, tuple)):
        given = given[0] if len(given) == 1 else None
    candidates = []
    if isinstance(given, str):
        within = [part for part in Path(given).parts if part not in ('..', '.')]
        candidates += [data / given, *([Path(root) / given, data / root / given] if root else []), Path(given)]
        candidates += [data.joinpath(*within[first:]) for first in range(len(within))]
    else:
        for name in names:
            candidates += [data / 'images' / name, data / name / 'images']
    folders = [each / 'images' if (each / 'images').is_dir() else each for each in candidates if each.is_dir()]
    return next((each.resolve() for each in folders if 'images' in each.resolve().parts), None)


def _voc_parts(data: Path, converted: Path) -> list[_Part]:
    whole = _voc_folders(data)
    if whole is not None:
        part = _convert_voc(*whole, converted / 'all.json')
        listed = [_voc_list(data, name) for name in ('train', 'val')]
        if all(listed):
            return [
                _subset(part, lambda stem, stems=stems: stem in stems, converted / f'{name}.json')
                for name, stems in zip(('train', 'val'), listed, strict=True)
            ]
        return [part]
    parts = []
    for name, names in (('train', TRAIN_NAMES), ('val', VAL_NAMES)):
        folder = child(data, names)
        folders = _voc_folders(folder) if folder is not None else None
        if folders is not None:
            parts.append(_convert_voc(*folders, converted / f'{name}.json'))
    return parts


def _voc_folders(data: Path) -> tuple[Path, Path] | None:
    """Return the folders of images and of .xml files."""
    annotations = child(data, ('Annotations', 'annotations', 'labels')) or data
    if not any(annotations.glob('*.xml')):
        return None
    return (child(data, _IMAGE_FOLDERS) or data).resolve(), annotations.resolve()


def _voc_list(data: Path, name: str) -> set[str]:
    path = data / 'ImageSets' / 'Main' / f'{name}.txt'
    return {line.split()[0] for line in path.read_text().splitlines() if line.strip()} if path.is_file() else set()


def _convert_voc(images: Path, annotations: Path, file: Path) -> _Part:
    return _convert(
        lambda supervision: supervision.DetectionDataset.from_pascal_voc(str(images), str(annotations)),
        images,
        file,
        by_name=True,
    )


def _convert(read: Any, images: Path, file: Path, by_name: bool = False) -> _Part:
    """Convert annotations to COCO's format by supervision.

    Args:
        read: Returns supervision's data set, given the module.
        images: Folder of the images.
        file: File to write.
        by_name: Whether to number classes in the order of their names, for formats that list none.

    Raises:
        CommandError: If supervision is missing, or cannot read the annotations.
    """
    try:
        import supervision
    except ImportError as error:
        raise CommandError(
            'YOLO and Pascal VOC annotations are converted by supervision, which is not installed: '
            "pip install 'ssm-backbones[convert]', or supervision alone."
        ) from error
    try:
        dataset = read(supervision)
        with writing(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            dataset.as_coco(annotations_path=str(file))
    except CommandError:
        raise
    except Exception as error:
        # Its readers raise arbitrary errors for damaged annotations.
        raise CommandError(f'the annotations of {images} cannot be converted: {error}') from error
    content = json.loads(file.read_text(encoding='utf-8'))
    if not content['images']:
        raise CommandError(f'{images} holds no images.')
    content = _ordered(content, by_name)
    with writing(file):
        write_atomic(file, json.dumps(content))
    return _Part(images, file, content)


def _ordered(content: dict[str, Any], by_name: bool) -> dict[str, Any]:
    """Return converted annotations in an order that is the same on every machine, without the formats' rounding.

    supervision lists YOLO's images as the file system does, and Pascal VOC's classes as they occur. What is trained
    depends on both orders.
    """
    categories = sorted(content['categories'], key=lambda each: each['name'] if by_name else each['id'])
    images = sorted(content['images'], key=lambda each: each['file_name'])
    category_ids = {each['id']: id for id, each in enumerate(categories, 1)}
    image_ids = {each['id']: id for id, each in enumerate(images, 1)}
    annotations = sorted(content['annotations'], key=lambda each: (image_ids[each['image_id']], each['id']))
    for id, each in enumerate(annotations, 1):
        boxed = each['area'] == each['bbox'][2] * each['bbox'][3]
        # YOLO's shares have six digits.
        _, _, width, height = each['bbox'] = [round(value, 2) for value in each['bbox']]
        each.update(
            id=id,
            image_id=image_ids[each['image_id']],
            category_id=category_ids[each['category_id']],
            area=width * height if boxed else each['area'],
            # Masks of several pieces are marked as crowds, which mmdet does not learn; these formats have no crowds.
            iscrowd=0,
        )
    return {
        **content,
        'images': [{**each, 'id': image_ids[each['id']]} for each in images],
        'categories': [{**each, 'id': category_ids[each['id']]} for each in categories],
        'annotations': annotations,
    }


def _divided(part: _Part, converted: Path, seed: int) -> list[_Part]:
    names = [image['file_name'] for image in part.content['images']]
    chosen = [set(each) for each in split(names, seed)]
    return [
        _subset(part, lambda stem, held=held: stem in held, converted / f'{name}.json', by_stem=False)
        for name, held in zip(('train', 'val'), chosen, strict=True)
    ]


def _subset(part: _Part, belongs: Any, file: Path, by_stem: bool = True) -> _Part:
    images = [
        image
        for image in part.content['images']
        if belongs(Path(image['file_name']).stem if by_stem else image['file_name'])
    ]
    if not images:
        raise CommandError(f'none of the images of {part.images} belongs to {file.stem}.')
    ids = {image['id'] for image in images}
    annotations = [each for each in part.content['annotations'] if each['image_id'] in ids]
    content = {**part.content, 'images': images, 'annotations': annotations}
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, json.dumps(content))
    return _Part(part.images, file, content)
