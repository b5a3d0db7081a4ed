"""Draw features as colours: the first three principal components of each level next to the input image."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from ssm_backbones.apis.images import UnreadableImage
from ssm_backbones.features.dataset import FeatureDataset
from ssm_backbones.features.store import PREVIEWS, Record
from ssm_backbones.utils.arrays import bands_last, read_array
from ssm_backbones.utils.errors import CommandError
from ssm_backbones.utils.files import atomic_file, file_name, writing
from ssm_backbones.visualization.colours import pca_colours
from ssm_backbones.visualization.reading import array_as_rgb

_SIDE, _GAP, _BAR = 320, 12, 44
_PAPER, _INK, _MUTED = (255, 255, 255), (32, 36, 44), (120, 126, 138)


def draw_preview(dataset: FeatureDataset, index: int, path: str | os.PathLike[str]) -> None:
    """Draw an image of an export next to the colours of its levels, into a PNG file.

    All panels show the model's input, after the config's resizing and cropping and without the data preprocessor's
    padding, so that they are aligned.

    Raises:
        UnreadableImage: If the image can no longer be read, or its size differs from the exported one's.
        OSError: If the file cannot be written.
    """
    from PIL import Image, ImageDraw, ImageFont

    record = dataset.records[index]
    height, width = record['input_size']
    scale = _SIDE / max(height, width)
    size = (max(round(width * scale), 1), max(round(height * scale), 1))
    original = _read(record['path'])
    if list(original.shape[:2]) != record['original_size']:
        raise UnreadableImage(
            f'it has {original.shape[0]} rows and {original.shape[1]} columns now, and had '
            f'{record["original_size"][0]} and {record["original_size"][1]} when it was exported'
        )
    note = f'{width} x {height}, of {original.shape[1]} x {original.shape[0]}'
    panels = [(_as_given(original, record, size), 'input', note)]
    for level, value in zip(record['levels'], dataset.maps(index, crop=True), strict=True):
        # The last cells may extend beyond an odd input.
        seen = (0, 0, width / level['stride'], height / level['stride'])
        colours = Image.fromarray(pca_colours(value)).transform(
            size, Image.Transform.EXTENT, seen, Image.Resampling.NEAREST, fillcolor=_MUTED
        )
        channels, rows, columns = level['shape']
        title = f'{level["name"]}, stride {level["stride"]}'
        panels.append((colours, title, f'{channels} channels, {columns} x {rows}'))
    step = max(size[0], 170) + _GAP
    sheet = Image.new('RGB', (step * len(panels) + _GAP, size[1] + _BAR + 2 * _GAP), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for place, (panel, title, note) in enumerate(panels):
        x = _GAP + place * step
        draw.text((x, _GAP - 4), title, fill=_INK, font=ImageFont.load_default(size=16))
        draw.text((x, _GAP + 16), note, fill=_MUTED, font=ImageFont.load_default(size=13))
        sheet.paste(panel, (x, _GAP + _BAR - 4))
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(target) as partial:
        sheet.save(partial, format='PNG')


def _as_given(original: np.ndarray, record: Record, size: tuple[int, int]) -> Any:
    """Resize, crop, pad and flip an image according to its record, to ``size`` (width, height)."""
    from PIL import Image

    image = Image.fromarray(original)
    left, top, right, bottom = record['image_box']
    across = sorted(record['offset_x'] + record['scale_x'] * x for x in (left, right))
    down = sorted(record['offset_y'] + record['scale_y'] * y for y in (top, bottom))
    if record['scale_x'] < 0:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        across = [image.width - x for x in reversed(across)]
    if record['scale_y'] < 0:
        image = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
        down = [image.height - y for y in reversed(down)]
    # Records are rounded; what lies beyond the image by a thousandth is no part of it.
    part = (max(across[0], 0.0), max(down[0], 0.0), min(across[1], image.width), min(down[1], image.height))
    factors = size[0] / record['input_size'][1], size[1] / record['input_size'][0]
    place = [round(value * factor) for value, factor in zip((left, top, right, bottom), factors * 2, strict=True)]
    drawn = (max(place[2] - place[0], 1), max(place[3] - place[1], 1))
    panel = Image.new('RGB', size, _MUTED)
    panel.paste(image.resize(drawn, Image.Resampling.LANCZOS, box=part), (place[0], place[1]))
    return panel


def _read(path: str) -> np.ndarray:
    """Read uint8 (H, W, 3), RGB, like the pipelines' default reader: 16 bits become 8, and EXIF rotation applies.

    Of arrays, and of TIFFs that OpenCV does not read, three bands are stretched to 8 bits.
    """
    import mmcv

    if not path.lower().endswith('.npy'):
        try:
            image = mmcv.imread(path, channel_order='rgb', backend='cv2')
        except Exception as error:
            # The decoder raises arbitrary errors for files that are damaged, too large or missing.
            if not path.lower().endswith(('.tif', '.tiff')):
                raise UnreadableImage(f'{type(error).__name__}: {str(error).strip()}') from error
        else:
            if image is not None and image.ndim == 3 and image.shape[2] == 3:
                return image
    try:
        return array_as_rgb(bands_last(read_array(path), path=path))
    except CommandError as error:
        raise UnreadableImage(str(error)) from error


def draw_missing_previews(folder: str | os.PathLike[str], ids: Collection[str], quiet: bool = False) -> None:
    """Draw the missing previews of images of an export, into its ``previews`` folder.

    Images that can no longer be read are reported on stderr and left out.

    Raises:
        CommandError: If the folder cannot be written, or the disk is full.
    """
    dataset = FeatureDataset(folder)
    for index, record in enumerate(dataset.records):
        path = Path(folder, PREVIEWS, f'{file_name(record["id"])}.png')
        if record['id'] in ids and not path.exists():
            try:
                with writing(folder):
                    draw_preview(dataset, index, path)
            except UnreadableImage as error:
                print(f'no preview of {record["path"]}: {error}', file=sys.stderr)
    if not quiet:
        print(f'previews: {Path(folder, PREVIEWS)}', file=sys.stderr)
