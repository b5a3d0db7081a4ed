"""Images and label maps of the same names: indices, palettes, black and white, or colours with a class list."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ssm_backbones.project.sources import (
    TRAIN_NAMES,
    VAL_NAMES,
    Found,
    child,
    images_below,
    read_class_list,
    sample,
    split,
)
from ssm_backbones.utils.errors import CommandError
from ssm_backbones.utils.files import atomic_file, write_atomic, writing
from ssm_backbones.utils.progress import progress

_IMAGE_FOLDERS = ('images', 'image', 'imgs', 'img', 'img_dir', 'JPEGImages')
_MASK_FOLDERS = ('masks', 'mask', 'labels', 'label', 'annotations', 'ann_dir', 'gt', 'SegmentationClass')
_LISTS = ('classes.txt', 'labelmap.txt', 'label_colors.txt', 'class_list.txt')
_IGNORED = 255
_ENDINGS = ('', '_mask', '_label', '_labels', '_gt', '_seg', '-mask', '_segmentation')

Pair = tuple[Path, Path]


@dataclass
class _Seen:
    """What all label maps hold.

    Attributes:
        values: Indices, with a file for each.
        colours: Colours, with a file for each, of maps in colours.
        coloured: Whether the maps have three channels that differ.
        stacked: Whether some maps are grey in three equal channels.
        palette: The palette of the first map in palette mode.
    """

    values: dict[int, Path] = field(default_factory=dict)
    colours: dict[tuple[int, int, int], Path] = field(default_factory=dict)
    coloured: bool = False
    stacked: bool = False
    palette: list[int] = field(default_factory=list)


def find_segmentation(data: Path, converted: Path, seed: int, classes: Path | None = None) -> Found:
    """Find images and label maps in a folder.

    Args:
        data: The folder, with ``images`` and ``masks`` (or ``labels``, ``annotations``), in either or around both of
            which may be ``train`` and ``val``.
        converted: Folder for lists and for label maps that are converted; created if needed.
        seed: Of the division, where there is no validation set.
        classes: A class list, see :func:`~ssm_backbones.project.sources.read_class_list`; by default one of the usual
            names in ``data``. Maps in colours need one with colours.

    Raises:
        CommandError: If an image has no label map, or the maps hold what the class list does not.
    """
    parts, notes = _pairs(data, seed)
    if classes is None:
        classes = next((data / name for name in _LISTS if (data / name).is_file()), None)
    listed = read_class_list(classes) if classes is not None else []
    seen = _look(parts)
    named, palette, table = _classes(seen, listed, classes, notes)
    settings = {}
    for name, pairs in parts.items():
        if table is not None or seen.stacked:
            pairs = _converted(pairs, converted / 'labels' / name, table, palette)
        settings[name] = _settings(pairs, converted / f'{name}.txt')
    if table is not None or seen.stacked:
        notes.append(f'label maps were converted to indices, see {converted / "labels"}')
    return Found(
        kind='images and label maps',
        classes=named,
        palette=palette,
        train=settings['train'],
        val=settings['val'],
        images=len(parts['train']),
        val_images=len(parts['val']),
        examples=sample([image for image, _ in parts['train']]),
        notes=notes,
    )


def _pairs(data: Path, seed: int) -> tuple[dict[str, list[Pair]], list[str]]:
    images, masks = child(data, _IMAGE_FOLDERS), child(data, _MASK_FOLDERS)
    if images is not None and masks is not None:
        inner = [(child(images, names), child(masks, names)) for names in (TRAIN_NAMES, VAL_NAMES)]
        if inner[0][0] is None:
            whole = _matched(images, masks)
            train, val = split(whole, seed)
            return dict(train=train, val=val), [
                f'no validation set was found: {len(val)} of {len(whole)} images were put aside (seed {seed})'
            ]
    else:
        inner = []
        for names in (TRAIN_NAMES, VAL_NAMES):
            folder = child(data, names)
            inner.append(
                (None, None) if folder is None else (child(folder, _IMAGE_FOLDERS), child(folder, _MASK_FOLDERS))
            )
    if any(folder is None for both in inner for folder in both):
        raise CommandError(
            f'data {data} has no images and label maps that are known: expected images/ and masks/ (or labels/, '
            'annotations/), each with train/ and val/ or without, or train/ and val/ with both in each.'
        )
    parts = {name: _matched(*both) for name, both in zip(('train', 'val'), inner, strict=True)}
    return parts, []


def _matched(images: Path | None, masks: Path | None) -> list[Pair]:
    """Pair images with the label maps of their names."""
    assert images is not None and masks is not None
    held = {path.relative_to(masks).with_suffix('').as_posix(): path for path in images_below(masks)}
    found, missing = [], []
    for path in images_below(images):
        name = path.relative_to(images).with_suffix('').as_posix()
        mask = next((held[f'{name}{ending}'] for ending in _ENDINGS if f'{name}{ending}' in held), None)
        if mask is None:
            missing.append(path.name)
        else:
            found.append((path.resolve(), mask.resolve()))
    if missing:
        raise CommandError(
            f'{len(missing)} of {len(missing) + len(found)} images in {images} have no label map of their name in '
            f'{masks}, such as {missing[0]}. Add the maps, or take the images out.'
        )
    if not found:
        raise CommandError(f'{images} holds no images.')
    return found


def _look(parts: dict[str, list[Pair]]) -> _Seen:
    from PIL import Image

    seen = _Seen()
    pairs = [pair for each in parts.values() for pair in each]
    with progress('reading label maps', len(pairs), disable=len(pairs) < 200) as advance:
        for _, path in pairs:
            try:
                with Image.open(path) as image:
                    if image.mode == 'P' and not seen.palette:
                        seen.palette = list(image.getpalette() or [])
                    pixels = np.asarray(image.convert('RGB') if image.mode in ('RGBA', 'LA', 'CMYK') else image)
            except (OSError, ValueError) as error:
                raise CommandError(f'label map {path} cannot be read: {error}') from error
            if pixels.ndim == 3 and (pixels == pixels[:, :, :1]).all():
                seen.stacked = True
                pixels = pixels[:, :, 0]
            if pixels.ndim == 3:
                seen.coloured = True
                for colour in np.unique(pixels.reshape(-1, 3), axis=0).tolist():
                    seen.colours.setdefault((colour[0], colour[1], colour[2]), path)
            else:
                for value in np.unique(pixels).tolist():
                    seen.values.setdefault(int(value), path)
                    seen.colours.setdefault((int(value),) * 3, path)
            advance(1)
    return seen


def _classes(
    seen: _Seen, listed: Sequence[tuple[str, tuple[int, int, int] | None]], path: Path | None, notes: list[str]
) -> tuple[tuple[str, ...], list[tuple[int, int, int]], dict[tuple[int, int, int], int] | None]:
    """Return names, palette, and the index of each colour where maps have to be converted."""
    names = tuple(name for name, _ in listed)
    given = [colour for _, colour in listed]
    if seen.coloured:
        some = ', '.join(map(str, sorted(seen.colours)[:8]))
        if not listed or None in given:
            raise CommandError(
                f'the label maps are in colours, {len(seen.colours)} of them: {some}. Name the classes in a file, a '
                'line each with the name and the colour: road 128 64 128 (classes).'
            )
        table = {colour: place for place, colour in enumerate(given) if colour is not None}
        strange = sorted(seen.colours.keys() - table.keys())
        if strange:
            raise CommandError(
                f'label map {seen.colours[strange[0]]} has the colour {strange[0]}, which {path} does not name'
                f'{f", and {len(strange) - 1} others" if len(strange) > 1 else ""}. Colours that a lossy format '
                'changed have to be mended.'
            )
        return names, [colour for colour in given if colour is not None], table
    values = set(seen.values)
    if values <= {0, 255}:
        # Black and white: as indices, the object would be what is ignored.
        if len(names) not in (0, 2):
            raise CommandError(f'the label maps are black and white, two classes; {path} names {len(names)}.')
        notes.append('the label maps are black and white: black is class 0, white class 1')
        return names or ('background', 'object'), _palette(given, 2, []), {(0, 0, 0): 0, (255, 255, 255): 1}
    largest = max(values - {_IGNORED})
    if names and largest >= len(names):
        raise CommandError(
            f'label map {seen.values[largest]} has the value {largest}; {path} names {len(names)} classes, 0 to '
            f'{len(names) - 1}. Values of 255 are ignored.'
        )
    if largest > _IGNORED:
        raise CommandError(
            f'label map {seen.values[largest]} has the value {largest}; mmseg reads label maps of 8 bits, up to 254.'
        )
    if not names:
        names = tuple(f'class_{place}' for place in range(largest + 1))
        notes.append(f'the classes have no names (classes): they are called {names[0]} to {names[-1]}')
    if _IGNORED in values:
        notes.append('pixels of the value 255 are ignored')
    return names, _palette(given, len(names), seen.palette), None


def _palette(
    given: Sequence[tuple[int, int, int] | None], count: int, of_maps: Sequence[int]
) -> list[tuple[int, int, int]]:
    """Return the colours of the class list, else of the maps' own palette, else none, for mmseg to draw some."""
    listed = [colour for colour in given if colour is not None]
    if len(listed) == count:
        return listed
    held = [(of_maps[3 * place], of_maps[3 * place + 1], of_maps[3 * place + 2]) for place in range(len(of_maps) // 3)]
    return held[:count] if len(set(held[:count])) == count else []


def _converted(
    pairs: Sequence[Pair],
    folder: Path,
    table: dict[tuple[int, int, int], int] | None,
    palette: Sequence[tuple[int, int, int]],
) -> list[Pair]:
    from PIL import Image

    found = []
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for image, mask in pairs:
            with Image.open(mask) as opened:
                pixels = np.asarray(opened if opened.mode in ('L', 'P', '1', 'I;16') else opened.convert('RGB'))
            if pixels.ndim == 3 and table is None:
                labels = pixels[:, :, 0]
            elif table is not None:
                pixels = pixels.astype(np.uint8) * 255 if pixels.dtype == bool else pixels
                pixels = pixels if pixels.ndim == 3 else np.repeat(pixels[:, :, None], 3, axis=2)
                labels = np.full(pixels.shape[:2], _IGNORED, np.uint8)
                for colour, index in table.items():
                    labels[(pixels == np.array(colour)).all(axis=2)] = index
            else:
                labels = pixels
            target = folder / f'{image.stem}.png'
            picture = Image.fromarray(labels.astype(np.uint8))
            if palette:
                picture.putpalette([value for colour in palette for value in colour])
            with atomic_file(target) as partial:
                picture.save(partial, format='PNG')
            found.append((image, target))
    return found


def _settings(pairs: Sequence[Pair], file: Path) -> dict[str, object]:
    """Write the list of a split's names, and return the settings of mmseg's data set for it."""
    images = _common([image for image, _ in pairs])
    masks = _common([mask for _, mask in pairs])
    image_suffix = _suffix([image for image, _ in pairs], 'images')
    names = [image.relative_to(images).as_posix()[: -len(image_suffix)] for image, _ in pairs]
    endings = {
        mask.relative_to(masks).as_posix().removeprefix(name) for name, (_, mask) in zip(names, pairs, strict=True)
    }
    if len(endings) > 1:
        raise CommandError(
            f'the label maps in {masks} are named in different ways: {", ".join(sorted(endings)[:3])} after the names '
            'of the images. mmseg takes one ending.'
        )
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, ''.join(f'{name}\n' for name in names))
    return dict(
        ann_file=str(file),
        data_prefix=dict(img_path=str(images), seg_map_path=str(masks)),
        img_suffix=image_suffix,
        seg_map_suffix=endings.pop(),
    )


def _common(paths: Sequence[Path]) -> Path:
    return Path(os.path.commonpath([path.parent for path in paths]))


def _suffix(paths: Sequence[Path], what: str) -> str:
    counts = Counter(path.suffix for path in paths)
    if len(counts) > 1:
        told = ', '.join(f'{count} {suffix}' for suffix, count in counts.most_common())
        raise CommandError(f'the {what} have different suffixes ({told}); mmseg takes one. Convert or rename them.')
    return next(iter(counts))
