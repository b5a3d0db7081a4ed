"""Images with a class each: folders named after classes, or tables."""

from __future__ import annotations

import csv
import os
from pathlib import Path

from ssm_backbones.project.sources import TRAIN_NAMES, VAL_NAMES, Found, child, images_below, sample, split
from ssm_backbones.utils.errors import CommandError
from ssm_backbones.utils.files import write_atomic, writing

_IMAGE_COLUMNS = ('image', 'path', 'file', 'filename', 'file_name', 'image_path', 'image_id', 'id')
_LABEL_COLUMNS = ('label', 'class', 'category', 'target', 'class_name')
_SPLIT_COLUMNS = ('split', 'set', 'subset')

Labelled = tuple[Path, str]


def find_classification(data: Path, converted: Path, seed: int) -> Found:
    """Find images and their classes in a folder.

    Args:
        data: The folder, with ``train/CLASS/`` and ``val/CLASS/``, with ``CLASS/`` alone, or with tables (.csv) that
            have a column for images and one for classes; or one such table.
        converted: Folder for the lists that are written; created if needed.
        seed: Of the division, where there is no validation set.

    Raises:
        CommandError: If no labelled images are found.
    """
    tables = [data] if data.is_file() else sorted(data.glob('*.csv'))
    kind = 'CSV' if tables else 'folders of classes'
    parts = _of_tables(tables) if tables else _of_folders(data)
    notes = []
    if not parts['val']:
        parts = _divided(parts['train'], seed)
        count = sum(map(len, parts.values()))
        notes.append(
            f'no validation set was found: {len(parts["val"])} of {count} images were put aside (seed {seed}), '
            f'see {converted}'
        )
    if not parts['train']:
        raise CommandError(f'data {data} has no training images.')
    classes = tuple(sorted({label for _, label in parts['train']}, key=_natural))
    unknown = sorted({label for _, label in parts['val']} - set(classes))
    if unknown:
        raise CommandError(f'the validation images have classes without a training image: {", ".join(unknown)}.')
    if len(classes) < 2:
        raise CommandError(f'data {data} has one class, {classes[0]}; a classifier needs two.')
    root = Path(os.path.commonpath([path.parent for paths in parts.values() for path, _ in paths]))
    settings = {}
    for name, paths in parts.items():
        lines = [f'{path.relative_to(root).as_posix()} {classes.index(label)}\n' for path, label in paths]
        file = converted / f'{name}.txt'
        with writing(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(file, ''.join(lines))
        settings[name] = dict(ann_file=str(file), data_prefix=str(root))
    return Found(
        kind=kind,
        classes=classes,
        train=settings['train'],
        val=settings['val'],
        images=len(parts['train']),
        val_images=len(parts['val']),
        examples=sample([path for path, _ in parts['train']]),
        notes=notes,
    )


def _natural(name: str) -> tuple[int, int, str]:
    """Order class names that are numbers by their values, before all others."""
    return (0, int(name), name) if name.isdigit() else (1, 0, name)


def _of_folders(data: Path) -> dict[str, list[Labelled]]:
    train, val = child(data, TRAIN_NAMES), child(data, VAL_NAMES)
    if train is None:
        return dict(train=_labelled(data), val=[])
    return dict(train=_labelled(train), val=[] if val is None else _labelled(val))


def _labelled(folder: Path) -> list[Labelled]:
    found = [
        (path.resolve(), inner.name)
        for inner in sorted(folder.iterdir())
        if inner.is_dir()
        for path in images_below(inner)
    ]
    if not found:
        raise CommandError(f'data {folder} holds no folders of images, one for each class, and no table (.csv).')
    return found


def _of_tables(tables: list[Path]) -> dict[str, list[Labelled]]:
    parts: dict[str, list[Labelled]] = dict(train=[], val=[])
    for table in tables:
        named = 'val' if len(tables) > 1 and any(name in table.stem.lower() for name in VAL_NAMES) else 'train'
        try:
            with open(table, encoding='utf-8-sig', newline='') as file:
                rows = list(csv.DictReader(file))
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise CommandError(f'table {table} cannot be read: {error}') from error
        columns = {str(name).strip().lower(): name for name in (rows[0] if rows else ())}
        image, label, part = (
            next((columns[name] for name in names if name in columns), None)
            for names in (_IMAGE_COLUMNS, _LABEL_COLUMNS, _SPLIT_COLUMNS)
        )
        if image is None or label is None:
            raise CommandError(
                f'table {table} has the columns {", ".join(columns) or "none"}; expected one of images '
                f'({", ".join(_IMAGE_COLUMNS)}) and one of classes ({", ".join(_LABEL_COLUMNS)}).'
            )
        for number, row in enumerate(rows, 2):
            path = _image_of_row(table, number, (row[image] or '').strip())
            if not (row[label] or '').strip():
                raise CommandError(f'table {table}, line {number}: {path.name} has no class.')
            of_row = (row[part] or '').strip().lower() if part is not None else ''
            chosen = 'val' if of_row in VAL_NAMES else 'train' if of_row in TRAIN_NAMES else named
            parts[chosen].append((path, row[label].strip()))
    return parts


def _image_of_row(table: Path, number: int, name: str) -> Path:
    for folder in (table.parent, table.parent / 'images', table.parent / table.stem):
        for suffix in ('', '.jpg', '.png'):
            path = folder / f'{name}{suffix}'
            if name and path.is_file():
                return path.resolve()
    raise CommandError(f'table {table}, line {number}: image {name!r} is not in {table.parent} or its images/.')


def _divided(values: list[Labelled], seed: int) -> dict[str, list[Labelled]]:
    """Put a share of each class aside, so that each is in both parts."""
    parts: dict[str, list[Labelled]] = dict(train=[], val=[])
    for label in sorted({label for _, label in values}):
        of_class = [value for value in values if value[1] == label]
        if len(of_class) < 2:
            raise CommandError(f'class {label} has {len(of_class)} image; training and validation need one each.')
        train, val = split(of_class, seed)
        parts['train'] += train
        parts['val'] += val
    return parts
