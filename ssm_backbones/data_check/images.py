"""Image files: which are there, their size and orientation as their headers say, and copies of one another."""

from __future__ import annotations

import functools
import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ssm_backbones.compat import without_pil_limit
from ssm_backbones.data_check.finding import WARNING, Findings

SAMPLED = 200
"""Files that are opened without ``every_file``."""
_HASHED = 2000
# Of more images, contents are not compared: to ask for the sizes of all takes long.
_COMPARED = 200_000
_ORIENTATION = 0x0112
_TURNING = (5, 6, 7, 8)


@dataclass(frozen=True)
class Header:
    """What an image file's header says.

    Attributes:
        width, height: Of the stored frame, before it is turned by its orientation.
        orientation: EXIF orientation, 1 to 8; 1 is upright.
    """

    width: int
    height: int
    orientation: int

    @property
    def frame(self) -> tuple[int, int]:
        """Width and height as stored."""
        return self.width, self.height

    def loaded_size(self, turns: bool) -> tuple[int, int]:
        """Return width and height as loaded, by a loader that turns images by their orientation or does not."""
        turned = turns and self.orientation in _TURNING
        return (self.height, self.width) if turned else (self.width, self.height)


def read_header(path: str) -> Header | None:
    """Read an image's header; None if PIL knows no such format (the pipeline's loader may)."""
    from PIL import Image

    try:
        with without_pil_limit(), Image.open(path) as image:
            return Header(*image.size, int(image.getexif().get(_ORIENTATION, 1) or 1))
    except (OSError, SyntaxError, ValueError, TypeError):
        return None


def turns_images(pipeline: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether a pipeline's loader turns images by their EXIF orientation."""
    loader = next((step for step in pipeline if str(step.get('type')).endswith('LoadImageFromFile')), {})
    color, backend = loader.get('color_type', 'color'), loader.get('imdecode_backend', 'cv2')
    return color in ('color', 'grayscale') and backend not in ('turbojpeg', 'tifffile')


def spread(items: Sequence[Any], every: bool) -> list[Any]:
    """Return all items, or some of them spread evenly."""
    if every or len(items) <= SAMPLED:
        return list(items)
    return [items[index] for index in np.linspace(0, len(items) - 1, SAMPLED).astype(int)]


def missing_files(paths: Iterable[str]) -> list[str]:
    """Return the paths of files that do not exist. Folders are listed, which is quicker than asking for each file."""
    listed: dict[str, set[str]] = {}
    missing = []
    for path in paths:
        folder, name = os.path.split(path)
        if folder not in listed:
            try:
                with os.scandir(folder or '.') as entries:
                    listed[folder] = {entry.name for entry in entries}
            except OSError:
                listed[folder] = set()
        if name not in listed[folder]:
            missing.append(path)
    return missing


def suffixes(folder: str) -> str:
    """Return the suffixes of the files below a folder and how many have each, as text."""
    counts = Counter(Path(name).suffix or name for _, _, names in os.walk(folder) for name in names)
    return ', '.join(f'{count} of {suffix}' for suffix, count in counts.most_common(4)) or 'no files'


def check_copies(train: Mapping[str, Sequence[str]], others: Mapping[str, Sequence[str]], findings: Findings) -> None:
    """Look for images of the training set in the other sets, by path and by content.

    Args:
        train: Paths by config key.
        others: Paths by config key.
        findings: Collects what is found.
    """
    trained = {_place(path): path for paths in train.values() for path in paths}
    by_size: dict[int, list[str]] | None = None
    for key, paths in others.items():
        same = [path for path in paths if _place(path) in trained]
        rest = spread([path for path in paths if _place(path) not in trained], len(paths) <= _HASHED)
        findings.add_all(
            WARNING, key, same, lambda path: (path, 'is trained on, too'), 'Evaluate on images that are not trained on.'
        )
        if by_size is None:
            by_size = {}
            for path in trained.values() if len(trained) <= _COMPARED else ():
                by_size.setdefault(_size(path), []).append(path)
        digests: dict[str, str] = {}
        pairs = []
        for path in rest:
            for other in by_size.get(_size(path), ())[:4]:
                if _digest(path, digests) == _digest(other, digests):
                    pairs.append((path, other))
                    break
            if len(digests) > _HASHED:
                break
        findings.add_all(
            WARNING,
            key,
            pairs,
            lambda pair: (pair[0], f'is a copy of {pair[1]}, which is trained on'),
            'Evaluate on images that are not trained on.',
        )


@functools.lru_cache(4096)
def _real_folder(folder: str) -> str:
    return os.path.realpath(folder)


def _place(path: str) -> str:
    folder, name = os.path.split(path)
    return os.path.join(_real_folder(folder), name)


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return -1


def _digest(path: str, known: dict[str, str]) -> str:
    if path not in known:
        try:
            known[path] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        except OSError:
            known[path] = path
    return known[path]
