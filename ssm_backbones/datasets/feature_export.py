"""Reads an export of ``tools/export_features.py`` back, for training heads on frozen features."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import Dataset

from ssm_backbones.export.store import INDEX, Record, read_settings
from ssm_backbones.preflight import CommandError


class FeatureDataset(Dataset):
    """The exported maps of pictures.

    An item is a dict with ``id`` (str), ``index`` (int) and ``maps``, a tuple of tensors (C, H, W); what else is known
    of a picture is in ``records[index]``: ``path``, ``original_size``, ``input_size`` (behind the config's resizing),
    ``padded_size`` (what the maps cover), ``levels``, and ``label`` or ``label_map`` where the data set had them. Files
    are mapped into memory, so a level that is not asked for is not read.

    Args:
        folder: The folder of the export.
        levels: Names of the levels to read, such as ``['level0', 'level3']``; all by default.
        crop: Cut off what of the maps lies in the padding.
        dtype: Convert maps to this type; by default they come as they are stored.
        transform: Called with each item; what it returns is the item then.

    Attributes:
        records: One dict for each picture, in the order of the export's input.
        settings: What made the features: ``fingerprint``, ``dtype``, ``neck``, and for each level ``name``, ``stride``
            and ``channels``.

    Raises:
        CommandError: If the folder holds no finished export, or a level is not in it.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        levels: Sequence[str] | None = None,
        *,
        crop: bool = False,
        dtype: torch.dtype | None = None,
        transform: Callable[[dict[str, Any]], Any] | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.settings = read_settings(folder)
        try:
            lines = (self.folder / INDEX).read_text(encoding='utf-8').splitlines()
        except FileNotFoundError:
            raise CommandError(f'{folder} has no {INDEX}: the export was interrupted; run it again.') from None
        self.records: list[Record] = [json.loads(line) for line in lines]
        held = [level['name'] for level in self.settings['levels']]
        unknown = [name for name in levels or () if name not in held]
        if unknown:
            raise CommandError(f'{folder} has no {", ".join(unknown)}; it holds {", ".join(held)}.')
        self.levels = list(held if levels is None else levels)
        self.crop = crop
        self.dtype = dtype
        self.transform = transform
        self._open: tuple[str, Any] | None = None

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Any:
        item = dict(id=self.records[index]['id'], index=index, maps=self.maps(index))
        return item if self.transform is None else self.transform(item)

    def __getstate__(self) -> dict[str, Any]:
        # An open file stays with its process.
        return {**self.__dict__, '_open': None}

    def maps(self, index: int, crop: bool | None = None) -> tuple[Tensor, ...]:
        """The maps of a picture; ``crop`` overrides the data set's."""
        record = self.records[index]
        file = self._file(record['file'])
        maps = tuple(file.get_tensor(f'{record["id"]}/{name}') for name in self.levels)
        if self.crop if crop is None else crop:
            maps = tuple(
                value[:, : _covered(value.shape[1], record, 0), : _covered(value.shape[2], record, 1)]
                for value in maps
            )
        return maps if self.dtype is None else tuple(value.to(self.dtype) for value in maps)

    def channels(self) -> list[int]:
        """Channels of each level that is read."""
        by_name = {level['name']: level['channels'] for level in self.settings['levels']}
        return [by_name[name] for name in self.levels]

    def _file(self, name: str) -> Any:
        # The pictures of a shard follow each other, so that one open file serves.
        if self._open is None or self._open[0] != name:
            self._open = (name, safe_open(str(self.folder / name), framework='pt'))
        return self._open[1]


def _covered(size: int, record: Record, axis: int) -> int:
    """Pixels of a map of ``size`` that see more of the picture than of the padding, at least in part."""
    return -(-size * record['input_size'][axis] // record['padded_size'][axis])
