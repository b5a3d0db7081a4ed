"""Features as colours: each level's first three principal components, beside the picture."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ssm_backbones.datasets.feature_export import FeatureDataset
from ssm_backbones.export.pictures import UnreadablePicture
from ssm_backbones.export.store import PREVIEWS, file_name, writing
from ssm_backbones.whole_files import whole_file

# torch.quantile takes no more than 2^24 values; so many pixels tell a component's range.
_SAMPLES = 1_000_000
_SIDE, _GAP, _BAR = 320, 12, 44
_PAPER, _INK, _MUTED = (255, 255, 255), (32, 36, 44), (120, 126, 138)


def pca_colours(features: Tensor) -> np.ndarray:
    """The first three principal components of a map as red, green and blue.

    Args:
        features: (C, H, W), floating-point, of any dtype.

    Returns:
        uint8 (H, W, 3). The colours of one map tell what is alike in it; those of two maps are not comparable. A map of
        fewer than three components leaves the other colours grey.
    """
    channels, height, width = features.shape
    pixels = features.float().flatten(1).t()
    pixels = pixels - pixels.mean(0)
    # Through the covariance, which is small however large the map is.
    values, vectors = torch.linalg.eigh((pixels.t() @ pixels).double() / max(len(pixels) - 1, 1))
    basis = vectors[:, values.argsort(descending=True)[:3]]
    # A component's sign is arbitrary: the largest weight is made positive, so that drawing twice gives one picture.
    largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))
    projected = pixels.double() @ (basis * torch.where(largest < 0, -1.0, 1.0))
    sample = projected[:: -(-len(projected) // _SAMPLES)]
    low, high = (torch.quantile(sample, q, dim=0) for q in (0.02, 0.98))
    spread = high - low
    flat = spread < 1e-9
    scaled = torch.where(flat, 0.5, ((projected - low) / spread.where(~flat, torch.ones(()).double())).clamp(0, 1))
    colours = torch.full((len(pixels), 3), 0.5, dtype=torch.float64)
    colours[:, : scaled.shape[1]] = scaled
    return (colours * 255).round().to(torch.uint8).view(height, width, 3).numpy()


def draw_preview(dataset: FeatureDataset, index: int, path: str | os.PathLike[str]) -> None:
    """Draw a picture of an export beside the colours of its levels, without their padding, into a PNG file.

    Raises:
        UnreadablePicture: If the picture can no longer be read.
        OSError: If the file cannot be written.
    """
    from PIL import Image, ImageDraw, ImageFont

    record = dataset.records[index]
    image = Image.fromarray(_read(record['path']))
    scale = _SIDE / max(image.size)
    size = (max(round(image.width * scale), 1), max(round(image.height * scale), 1))
    panels = [(image.resize(size, Image.Resampling.LANCZOS), 'input', f'{image.width} x {image.height}')]
    for level, value in zip(record['levels'], dataset.maps(index, crop=True), strict=True):
        colours = Image.fromarray(pca_colours(value)).resize(size, Image.Resampling.NEAREST)
        channels, height, width = level['shape']
        title = f'{level["name"]}, stride {level["stride"]}'
        panels.append((colours, title, f'{channels} channels, {width} x {height}'))
    step = max(size[0], 150) + _GAP
    sheet = Image.new('RGB', (step * len(panels) + _GAP, size[1] + _BAR + 2 * _GAP), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for place, (panel, title, note) in enumerate(panels):
        x = _GAP + place * step
        draw.text((x, _GAP - 4), title, fill=_INK, font=ImageFont.load_default(size=16))
        draw.text((x, _GAP + 16), note, fill=_MUTED, font=ImageFont.load_default(size=13))
        sheet.paste(panel, (x, _GAP + _BAR - 4))
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(target) as partial:
        sheet.save(partial, format='PNG')


def _read(path: str) -> np.ndarray:
    """uint8 (H, W, 3), RGB, as the pipelines' default reader has it: 16 bits become 8, and EXIF turns the picture."""
    import mmcv

    try:
        return mmcv.imread(path, channel_order='rgb', backend='cv2')
    except Exception as error:
        # The decoder raises what it will for files that are damaged, too large for it, or gone by now.
        raise UnreadablePicture(f'{type(error).__name__}: {str(error).strip()}') from error


def draw_missing_previews(folder: str | os.PathLike[str], ids: Collection[str], quiet: bool = False) -> None:
    """Draw the previews of these pictures of an export that are not there yet, into its ``previews`` folder.

    A picture that cannot be read now is told on the error stream, and left out.

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
            except UnreadablePicture as error:
                print(f'no preview of {record["path"]}: {error}', file=sys.stderr)
    if not quiet:
        print(f'previews: {Path(folder, PREVIEWS)}', file=sys.stderr)
