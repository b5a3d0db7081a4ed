"""What the three tasks share in reading a folder: data that was found, images, splits, colours."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ssm_backbones.apis.images import SUFFIXES
from ssm_backbones.utils.errors import CommandError

TRAIN_NAMES = ('train', 'training', 'train2017')
VAL_NAMES = ('val', 'valid', 'validation', 'val2017', 'test')
VAL_SHARE = 0.1

T = TypeVar('T')


@dataclass
class Found:
    """Data of a task, as a config names it.

    Attributes:
        kind: The format, for messages.
        classes: Names of the classes, in the order of their indices.
        palette: Their RGB colours.
        train: Settings of the training data set, and ``val`` of the validation set, as in a config.
        images: Number of training images, and ``val_images`` of validation images.
        examples: Some training images, from which bands and sizes are read.
        masks: Whether each object has a mask; for detection.
        notes: What users should know.
    """

    kind: str
    classes: tuple[str, ...]
    train: dict[str, Any]
    val: dict[str, Any]
    images: int
    val_images: int
    examples: list[Path]
    palette: list[tuple[int, int, int]] = field(default_factory=list)
    masks: bool = False
    notes: list[str] = field(default_factory=list)


def images_below(folder: Path) -> list[Path]:
    """Return the image files in a folder and below, sorted."""
    return sorted(path for path in folder.rglob('*') if path.suffix.lower() in SUFFIXES and path.is_file())


def child(folder: Path, names: Iterable[str]) -> Path | None:
    """Return the first of some folders that exists in a folder, whatever its case."""
    held = {path.name.lower(): path for path in sorted(folder.iterdir(), reverse=True) if path.is_dir()}
    return next((held[name.lower()] for name in names if name.lower() in held), None)


def split(values: Sequence[T], seed: int, share: float = VAL_SHARE) -> tuple[list[T], list[T]]:
    """Divide values at random into training and validation, at least one in each, both in their order.

    Raises:
        CommandError: If there are fewer than two.
    """
    if len(values) < 2:
        raise CommandError(f'{len(values)} images cannot be divided into training and validation.')
    count = min(max(round(len(values) * share), 1), len(values) - 1)
    chosen = set(random.Random(seed).sample(range(len(values)), count))
    return (
        [value for place, value in enumerate(values) if place not in chosen],
        [value for place, value in enumerate(values) if place in chosen],
    )


def sample(paths: Sequence[Path], count: int = 64) -> list[Path]:
    """Return at most so many paths, evenly spread."""
    step = max(len(paths) / count, 1)
    return [paths[int(place * step)] for place in range(min(count, len(paths)))]


def read_class_list(path: Path) -> list[tuple[str, tuple[int, int, int] | None]]:
    """Read a class a line: a name, or a name and its colour, as ``road 128 64 128`` or CVAT's ``road:128,64,128::``.

    Raises:
        CommandError: If the file cannot be read or holds no class.
    """
    try:
        lines = path.read_text(encoding='utf-8-sig').splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f'classes {path} cannot be read: {error}') from error
    found: list[tuple[str, tuple[int, int, int] | None]] = []
    for line in lines:
        text = line.split('#')[0].strip()
        if not text:
            continue
        name, separator, rest = text.partition(':')
        words = [name, *rest.split(':')[0].split(',')] if separator else text.replace(',', ' ').split()
        numbers = [word.strip() for word in words[-3:]]
        if len(words) >= 4 and all(word.isdigit() and int(word) < 256 for word in numbers):
            red, green, blue = map(int, numbers)
            found.append((' '.join(words[:-3]).strip(), (red, green, blue)))
        else:
            found.append((name.strip() if separator else text, None))
    if not found:
        raise CommandError(f'classes {path} holds no class; write one a line.')
    return found
