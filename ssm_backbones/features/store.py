"""Files of a feature export, all written atomically.

Layout of the folder::

    export.json            settings of the export: fingerprint, levels, dtype
    index.jsonl            one record for each image, in the order of the input
    features/<id>.safetensors                one image a file, or
    features/shard-<hash>.safetensors        many images a file
    unreadable.jsonl       images that could not be exported, if any
    previews/<id>.png      drawings of the levels, with --preview

A file holds the tensors ``<id>/<level>``, each (C, H, W), and in its metadata, under ``images``, the records of its
images as JSON. The index repeats them, so that it can be rebuilt from the files at any time.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ssm_backbones.utils.errors import CommandError
from ssm_backbones.utils.files import PARTIAL_NAME, atomic_file, file_name, write_atomic, writing

# 2: records say where an input lies on the original image (:class:`~ssm_backbones.features.placement.Placement`).
FORMAT = 'ssm_backbones.features/2'
DTYPES = {'fp32': torch.float32, 'fp16': torch.float16, 'bf16': torch.bfloat16}
EXPORT, INDEX, UNREADABLE = 'export.json', 'index.jsonl', 'unreadable.jsonl'
FEATURES, PREVIEWS = 'features', 'previews'

Record = dict[str, Any]


class FeatureStore:
    """The folder of an export, for writing.

    Args:
        folder: The folder; created if missing.
        settings: JSON-serialisable settings of the export. An existing export with other settings is rejected.
        shard_size: Images per file; 0 for one file per image, named by its id.
    """

    def __init__(self, folder: str | os.PathLike[str], settings: Mapping[str, Any], shard_size: int = 0) -> None:
        self.folder = Path(folder)
        self.shard_size = shard_size
        self._waiting: list[tuple[Record, dict[str, Tensor]]] = []
        self._settings = {'format': FORMAT, **settings}

    def open(self) -> None:
        """Create the folder or check that its export has the same settings, and remove partial files of killed runs.

        Raises:
            CommandError: If the folder holds another export or cannot be written.
        """
        with writing(self.folder):
            (self.folder / FEATURES).mkdir(parents=True, exist_ok=True)
            path = self.folder / EXPORT
            if path.exists():
                self._check_settings(read_settings(self.folder))
            else:
                write_atomic(path, json.dumps(self._settings, indent=1) + '\n')
            for left in self._left():
                left.unlink()

    def _left(self) -> list[Path]:
        """Find partial files of killed runs in the folders of an export; other files there are not touched."""
        found = list(self.folder.glob('.*.part'))
        for name in (FEATURES, PREVIEWS):
            found += (self.folder / name).rglob('.*.part')
        return [path for path in found if PARTIAL_NAME.fullmatch(path.name)]

    def _check_settings(self, held: Mapping[str, Any]) -> None:
        for key, value in self._settings.items():
            if held.get(key) != value:
                what = 'another model (its fingerprint differs)' if key == 'fingerprint' else f'another {key}'
                raise CommandError(
                    f'out {self.folder} holds an export of {what}: {held.get(key)}, this one has {value}. '
                    'Name another folder, or remove that one.'
                )

    def done(self) -> dict[str, Record]:
        """Read the records of all exported images, by id."""
        return {record['id']: record for record in read_records(self.folder)}

    def add(self, record: Record, maps: Mapping[str, Tensor]) -> None:
        """Write an image's maps, or keep them until a shard is full."""
        self._waiting.append((record, {f'{record["id"]}/{level}': value for level, value in maps.items()}))
        if len(self._waiting) >= max(self.shard_size, 1):
            self.flush()

    def flush(self) -> None:
        """Write the waiting maps, as a smaller shard if they do not fill one.

        Raises:
            CommandError: If the folder cannot be written, or the disk is full.
        """
        if not self._waiting:
            return
        ids = [record['id'] for record, _ in self._waiting]
        if self.shard_size:
            name = f'shard-{hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:16]}'
        else:
            name = file_name(ids[0])
        path = self.folder / FEATURES / f'{name}.safetensors'
        records = [{**record, 'file': path.relative_to(self.folder).as_posix()} for record, _ in self._waiting]
        tensors = {key: value for _, maps in self._waiting for key, value in maps.items()}
        # If writing fails, these are not tried again.
        self._waiting.clear()
        with writing(self.folder):
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as partial:
                save_file(tensors, str(partial), metadata={'format': FORMAT, 'images': json.dumps(records)})

    def write_index(self, order: Sequence[str]) -> int:
        """Write the index of all exported features: the given ids first, in their order.

        Returns:
            The number of images in the index.

        Raises:
            CommandError: If the folder cannot be written, or the disk is full.
        """
        records = self.done()
        ids = [id for id in order if id in records]
        ids += sorted(records.keys() - set(ids))
        with writing(self.folder):
            write_atomic(self.folder / INDEX, ''.join(json.dumps(records[id]) + '\n' for id in ids))
        return len(ids)

    def write_unreadable(self, failures: Sequence[Mapping[str, str]]) -> None:
        """Write the list of images that could not be exported, or remove an earlier run's if there are none.

        Raises:
            CommandError: If the folder cannot be written, or the disk is full.
        """
        path = self.folder / UNREADABLE
        with writing(self.folder):
            if failures:
                write_atomic(path, ''.join(json.dumps(failure) + '\n' for failure in failures))
            else:
                path.unlink(missing_ok=True)


def read_settings(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the settings of the export in a folder.

    Raises:
        CommandError: If the folder does not contain an export of this format, or its settings are damaged.
    """
    path = Path(folder, EXPORT)
    try:
        settings = json.loads(path.read_text(encoding='utf-8'))
    except FileNotFoundError:
        raise CommandError(f'{folder} holds no feature export: it has no {EXPORT}.') from None
    except (ValueError, RecursionError) as error:
        raise CommandError(f'{path} is damaged: {error}') from error
    if not isinstance(settings, dict) or settings.get('format') != FORMAT:
        found = settings.get('format') if isinstance(settings, dict) else settings
        raise CommandError(
            f'{path} is of the format {found!r}, expected {FORMAT!r}: records of other formats do not '
            'say where the features lie on the image. Export again into another folder.'
        )
    levels = settings.get('levels') or ()
    if not _is_list(levels, dict) or not all(_has(level, name=str, stride=int, channels=int) for level in levels):
        raise CommandError(f'{path} is damaged: it describes no levels. Export again into another folder.')
    return settings


def read_index(folder: str | os.PathLike[str]) -> list[Record]:
    """Read the records of a finished export, in the order of its input.

    Raises:
        CommandError: If the export is not finished or its index is damaged.
    """
    path = Path(folder, INDEX)
    try:
        lines = path.read_text(encoding='utf-8').splitlines()
    except FileNotFoundError:
        raise CommandError(f'{folder} has no {INDEX}: the export was interrupted; run it again.') from None
    except ValueError as error:
        raise CommandError(
            f'{path} is damaged ({error}); export again into the same folder, which rewrites it.'
        ) from error
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(_checked(json.loads(line)))
        except (ValueError, RecursionError) as error:
            raise CommandError(
                f'line {number} of {path} is damaged ({error}); export again into the same folder, which rewrites it.'
            ) from error
    return records


def read_records(folder: str | os.PathLike[str]) -> Iterator[Record]:
    """Read the records of all features in a folder, from the files themselves.

    Raises:
        CommandError: If a file is damaged.
    """
    for path in sorted(Path(folder, FEATURES).rglob('*.safetensors')):
        if path.name.startswith('.'):
            continue
        try:
            with safe_open(str(path), framework='pt') as file:
                yield from [_checked(record) for record in json.loads(file.metadata()['images'])]
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise CommandError(
                f'{path} is damaged or no part of an export ({error}); remove it and export again.'
            ) from error


def _checked(record: Any) -> Record:
    """Return a record that has all that readers use, and names a file within the export's folder.

    Raises:
        ValueError: If it does not.
    """
    numbers = dict.fromkeys(('scale_x', 'scale_y', 'offset_x', 'offset_y'), (int, float))
    lists = ('original_size', 'input_size', 'padded_size', 'image_box', 'levels')
    if not isinstance(record, dict) or not _has(
        record, id=str, file=str, path=str, **numbers, **dict.fromkeys(lists, list)
    ):
        raise ValueError('a record lacks a value, or has one of another type')
    if not all(math.isfinite(record[name]) for name in numbers):
        raise ValueError('a record has a place that is not finite')
    if not all(
        len(record[name]) == 4 - 2 * name.endswith('size') and _is_list(record[name], int) for name in lists[:4]
    ):
        raise ValueError('a record has sizes that are no lists of whole numbers')
    for level in record['levels']:
        if not isinstance(level, dict) or not _has(level, name=str, stride=int, shape=list):
            raise ValueError('a record has a level without a name, stride or shape')
        if len(level['shape']) != 3 or not _is_list(level['shape'], int) or level['stride'] < 1:
            raise ValueError('a record has a level of no possible size')
    file = PurePosixPath(record['file'])
    if file.is_absolute() or '..' in file.parts or '\0' in record['file']:
        raise ValueError(f'a record names the file {record["file"]!r}, outside the folder')
    return record


def _has(value: Mapping[str, Any], **kinds: Any) -> bool:
    return all(isinstance(value.get(name), kind) for name, kind in kinds.items())


def _is_list(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)
