"""Contact sheets of results, truth next to prediction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ssm_backbones.utils.files import atomic_file

_INK, _PAPER, _MUTED = (32, 36, 44), (255, 255, 255), (120, 126, 138)


@dataclass(frozen=True)
class Instances:
    """Objects in one image, true or predicted.

    Attributes:
        labels: Integers (n,), index into the class names.
        boxes: Floats (n, 4), left, top, right and bottom in pixels.
        masks: Boolean (n, height, width).
        scores: Floats (n,) for predictions, None for the truth.
    """

    labels: np.ndarray
    boxes: np.ndarray
    masks: np.ndarray
    scores: np.ndarray | None = None


def draw_instances(
    image: np.ndarray, found: Instances, classes: Sequence[str], palette: Sequence[Sequence[int]], zoom: int = 3
) -> np.ndarray:
    """Draw masks, outlines, boxes and names on an enlarged image.

    Args:
        image: uint8 (height, width, 3), RGB.
        found: The objects to draw.
        classes, palette: Name and RGB colour (0..255) of each label.
        zoom: Factor by which the image is enlarged, so that lines and names stay legible.

    Returns:
        uint8 (zoom * height, zoom * width, 3), RGB.
    """
    from PIL import Image, ImageDraw, ImageFont

    height, width = image.shape[:2]
    size = (zoom * width, zoom * height)
    canvas = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC), dtype=np.float32)
    for label, mask in zip(found.labels, found.masks, strict=True):
        smooth = Image.fromarray(mask.astype(np.uint8) * 255).resize(size, Image.Resampling.BICUBIC)
        cover = np.asarray(smooth, dtype=np.float32)[..., None] / 255
        outline = ((cover > 0.25) & (cover < 0.75)).astype(np.float32)
        alpha = np.maximum(0.4 * cover, 0.9 * outline)
        canvas = canvas * (1 - alpha) + np.asarray(palette[label], dtype=np.float32) * alpha
    drawn = Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(drawn)
    font = ImageFont.load_default(size=13)
    for index, (label, box) in enumerate(zip(found.labels, found.boxes, strict=True)):
        colour = tuple(palette[label])
        left, top, right, bottom = (round(float(value) * zoom) for value in box)
        draw.rectangle((left, top, max(right - 1, left), max(bottom - 1, top)), outline=colour, width=2)
        name = classes[label] if found.scores is None else f'{classes[label]} {found.scores[index]:.2f}'
        text = draw.textbbox((0, 0), name, font=font)
        text_width, text_height = text[2] + 6, text[3] + 4
        x = min(max(left, 0), max(size[0] - text_width, 0))
        y = top - text_height if top >= text_height else max(top, 0)
        draw.rectangle((x, y, x + text_width, y + text_height), fill=colour)
        ink = _INK if sum(colour) > 380 else _PAPER
        draw.text((x + 3, y + 1), name, fill=ink, font=font)
    return np.asarray(drawn)


def draw_label_map(
    image: np.ndarray, labels: np.ndarray, palette: Sequence[Sequence[int]], ignored: int = 255, zoom: int = 2
) -> np.ndarray:
    """Overlay the classes' colours on an enlarged grey version of an image.

    Args:
        image: uint8 (height, width, 3), RGB.
        labels: Integers (height, width), the class of each pixel, or ``ignored``, which darkens it.
        palette: RGB colour (0..255) of each class.
        ignored: Label of pixels that belong to no class.
        zoom: Factor by which the image is enlarged.

    Returns:
        uint8 (zoom * height, zoom * width, 3), RGB.

    Raises:
        ValueError: If a label has no colour.
    """
    wrong = labels[(labels != ignored) & (labels >= len(palette))]
    if wrong.size:
        raise ValueError(f'label {int(wrong[0])} has no colour; the palette has {len(palette)}')
    colours = np.zeros((max(ignored, len(palette) - 1) + 1, 3), dtype=np.float32)
    colours[: len(palette)] = palette
    grey = image.astype(np.float32).mean(axis=2, keepdims=True)
    blended = 0.4 * grey + 0.6 * colours[labels]
    return blended.astype(np.uint8).repeat(zoom, axis=0).repeat(zoom, axis=1)


def draw_scores(scores: np.ndarray, truth: int, classes: Sequence[str], size: tuple[int, int]) -> np.ndarray:
    """Draw class scores as bars: the highest one green if it is the truth's and red otherwise, the truth outlined.

    Args:
        scores: Floats (classes,), 0..1.
        truth: Index of the true class.
        classes: Names.
        size: Height and width of the result in pixels.

    Returns:
        uint8 (height, width, 3), RGB.
    """
    from PIL import Image, ImageDraw, ImageFont

    height, width = size
    drawn = Image.new('RGB', (width, height), (246, 247, 249))
    draw = ImageDraw.Draw(drawn)
    font = ImageFont.load_default(size=12)
    step, left = height / len(classes), 74
    guess = int(np.argmax(scores))
    for label, (name, score) in enumerate(zip(classes, scores.tolist(), strict=True)):
        top, bottom = round(label * step + 0.2 * step), round(label * step + 0.8 * step)
        colour = _MUTED if label != guess else (46, 160, 67) if guess == truth else (218, 54, 51)
        room = width - left - 40
        draw.rectangle((left, top, left + max(1, round(room * score)), bottom), fill=colour)
        if label == truth:
            draw.rectangle((2, top - 4, width - 3, bottom + 4), outline=_INK, width=1)
        draw.text((6, (top + bottom) / 2), name, fill=_INK, font=font, anchor='lm')
        draw.text((width - 6, (top + bottom) / 2), f'{score:.2f}', fill=_INK, font=font, anchor='rm')
    return np.asarray(drawn)


def save_contact_sheet(
    pairs: Sequence[tuple[np.ndarray, np.ndarray]],
    titles: tuple[str, str],
    heading: str,
    path: str | Path,
    columns: int = 2,
    legend: Sequence[tuple[str, Sequence[int]]] = (),
) -> None:
    """Save pairs of images, each pair side by side under its titles.

    Args:
        pairs: uint8 (height, width, 3) each, RGB.
        titles: Titles of the two images of each pair.
        heading: Title of the sheet, in the largest font that fits.
        path: The PNG file to write.
        columns: Number of columns of pairs.
        legend: Names and RGB colours of the legend below the heading.
    """
    from PIL import Image, ImageDraw, ImageFont

    if not pairs:
        raise ValueError('a contact sheet needs at least one pair of images')
    gap, bar = 10, 24
    top = 78 if legend else 52
    height = max(image.shape[0] for pair in pairs for image in pair)
    width = max(image.shape[1] for pair in pairs for image in pair)
    rows = -(-len(pairs) // columns)
    step_x, step_y = 2 * width + 4 + 3 * gap, height + gap
    sheet = Image.new('RGB', (columns * step_x - gap, top + bar + rows * step_y), _PAPER)
    draw = ImageDraw.Draw(sheet)
    font = next(
        font
        for size in range(22, 0, -1)
        if (font := ImageFont.load_default(size=size)).getlength(heading) <= sheet.width - 2 * gap or size == 1
    )
    draw.text((gap, 14), heading, fill=_INK, font=font)
    small = ImageFont.load_default(size=15)
    x = gap
    for name, colour in legend:
        draw.rectangle((x, 50, x + 14, 64), fill=tuple(colour))
        draw.text((x + 20, 48), name, fill=_INK, font=small)
        x += 36 + round(draw.textlength(name, font=small))
    for column in range(min(columns, len(pairs))):
        for side, title in enumerate(titles):
            draw.text((gap + column * step_x + side * (width + 4), top), title, fill=_MUTED, font=small)
    for index, pair in enumerate(pairs):
        x, y = gap + index % columns * step_x, top + bar + index // columns * step_y
        for side, image in enumerate(pair):
            sheet.paste(Image.fromarray(image), (x + side * (width + 4), y))
    with atomic_file(path) as partial:
        sheet.save(partial, format='PNG')
