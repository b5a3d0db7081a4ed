"""Read an export of ``tools/export_features.py``, for training heads on frozen features."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import Dataset

from ssm_backbones.features.store import INDEX, Record, read_index, read_settings
from ssm_backbones.utils.errors import CommandError


class FeatureDataset(Dataset):
    """Data set of exported feature maps.

    An item is a dict with ``id`` (str), ``index`` (int) and ``maps``, a tuple of tensors (C, H, W). Files are mapped
    into memory, so levels that are not selected are not read. ``records[index]`` has further information on an image:

    ``path``
        The image's file.
    ``original_size``, ``input_size``, ``padded_size``
        Height and width of the image, of the pipeline's output, and of the area that the maps cover, which the data
        preprocessor may have padded at the bottom and right.
    ``scale_x``, ``scale_y``, ``offset_x``, ``offset_y``
        Coordinate map from the input to the original image after the pipeline's resizing, cropping, padding and
        flipping: ``original_x = offset_x + scale_x * input_x``, and the same for y. Coordinates are in pixels and
        continuous, 0 at the left (upper) edge of the first pixel. See :meth:`cell_edges` and :meth:`to_input`.
    ``image_box``
        Left, top, right and bottom of the image within the input, in pixels; padding of the pipeline is outside.
    ``levels``
        Name, ``stride`` and ``shape`` (C, H, W) of each map. Cell (i, j) covers the square of ``stride`` pixels of the
        input whose upper left corner is (i * stride, j * stride), consistent with resizing a map to the input. The
        receptive fields of a backbone's convolutions are centred up to half a cell off.
    ``label``, ``label_map``
        The data set's annotations, if any.

    Args:
        folder: The folder of the export.
        levels: Names of the levels to read, such as ``['level0', 'level3']``; all by default.
        crop: Crop the maps' padding at the bottom and right.
        dtype: Convert maps to this dtype; by default they keep the stored one.
        transform: Called with each item; its result replaces the item.

    Attributes:
        records: One dict for each image, in the order of the export's input.
        settings: Settings of the export: ``fingerprint``, ``dtype``, ``neck``, and for each level ``name``, ``stride``
            and ``channels``.

    Raises:
        CommandError: If the folder does not contain a finished export of this format, or a level does not exist.
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
        self.records: list[Record] = read_index(folder)
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
        """Read the maps (C, H, W) of an image; ``crop`` overrides the data set's.

        Raises:
            CommandError: If the file is missing, damaged or has other maps than the record says.
        """
        record = self.records[index]
        try:
            file = self._file(record['file'])
            maps = tuple(file.get_tensor(f'{record["id"]}/{name}') for name in self.levels)
        except (SafetensorError, OSError) as error:
            raise CommandError(
                f'{self.folder / record["file"]} is missing or damaged ({error}); remove it and export again.'
            ) from error
        for name, value in zip(self.levels, maps, strict=True):
            if list(value.shape) != _level(record, name)['shape']:
                raise CommandError(
                    f'{self.folder / record["file"]} has {name} of the shape {list(value.shape)}, not '
                    f'{_level(record, name)["shape"]} as {INDEX} says; remove it and export again.'
                )
        if self.crop if crop is None else crop:
            sizes = (self._covered(record, name) for name in self.levels)
            maps = tuple(value[:, :height, :width] for value, (height, width) in zip(maps, sizes, strict=True))
        return maps if self.dtype is None else tuple(value.to(self.dtype) for value in maps)

    def channels(self) -> list[int]:
        """Return the channels of each selected level."""
        by_name = {level['name']: level['channels'] for level in self.settings['levels']}
        return [by_name[name] for name in self.levels]

    def strides(self) -> list[int]:
        """Return the stride of each selected level: pixels of the input along a side of a cell."""
        by_name = {level['name']: level['stride'] for level in self.settings['levels']}
        return [by_name[name] for name in self.levels]

    def cell_edges(self, index: int) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
        """Compute the cell edges of an image's maps in coordinates of the original image.

        Returns:
            For each selected level ``(y, x)``, float64 arrays of H + 1 and W + 1 coordinates in pixels of the original:
            cell (i, j) of the map covers ``y[i]`` to ``y[i + 1]`` and ``x[j]`` to ``x[j + 1]``. They descend if the
            pipeline flips. Cells of padding lie outside the image or its crop.
        """
        record = self.records[index]
        edges = []
        for name, stride in zip(self.levels, self.strides(), strict=True):
            height, width = self._covered(record, name) if self.crop else _level(record, name)['shape'][1:]
            edges.append(
                (
                    record['offset_y'] + record['scale_y'] * stride * np.arange(height + 1.0),
                    record['offset_x'] + record['scale_x'] * stride * np.arange(width + 1.0),
                )
            )
        return tuple(edges)

    def to_input(self, index: int, image: np.ndarray, fill: float = 0) -> np.ndarray:
        """Resample an array over the original image, such as a label map, to the model's input.

        Args:
            index: Number of the image.
            image: Array (H, W) or (H, W, C) of the original size, of any dtype.
            fill: Value of padding: for label maps, the label that the loss ignores.

        Returns:
            An array of the record's ``padded_size`` with the other dimensions and the dtype of ``image``, by nearest
            neighbours.

        Raises:
            ValueError: If the array does not have the original size.
        """
        record = self.records[index]
        if list(image.shape[:2]) != record['original_size']:
            height, width = record['original_size']
            raise ValueError(f'{record["path"]} has {height} rows and {width} columns, got an array {image.shape}.')
        result = np.full((*record['padded_size'], *image.shape[2:]), fill, image.dtype)
        left, top, right, bottom = record['image_box']
        rows = np.floor(record['offset_y'] + record['scale_y'] * (np.arange(top, bottom) + 0.5))
        columns = np.floor(record['offset_x'] + record['scale_x'] * (np.arange(left, right) + 0.5))
        # Records are rounded, so that the edge of a pixel may lie beyond the image by a thousandth.
        rows, columns = (
            np.clip(places, 0, size - 1).astype(int)
            for places, size in zip((rows, columns), record['original_size'], strict=True)
        )
        result[top:bottom, left:right] = image[np.ix_(rows, columns)]
        return result

    def _covered(self, record: Record, name: str) -> tuple[int, int]:
        """Return the rows and columns of a level's map that are not entirely padding."""
        level = _level(record, name)
        _, height, width = level['shape']
        _, _, right, bottom = record['image_box']
        return min(height, -(-bottom // level['stride'])), min(width, -(-right // level['stride']))

    def _file(self, name: str) -> Any:
        # The images of a shard are consecutive, so one open file is enough.
        if self._open is None or self._open[0] != name:
            self._open = (name, safe_open(str(self.folder / name), framework='pt'))
        return self._open[1]


def _level(record: Record, name: str) -> dict[str, Any]:
    level = next((level for level in record['levels'] if level['name'] == name), None)
    if level is None:
        raise CommandError(f'the record of {record["id"]} has no {name}; export again.')
    return level
