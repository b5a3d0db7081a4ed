"""Checks of COCO annotations, on which mmdet's CocoDataset trains and by which CocoMetric evaluates."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ssm_backbones.data_check.coco_file import ABSENT, DEGENERATE, EMPTY, MALFORMED, CocoFile
from ssm_backbones.data_check.finding import ERROR, NOTE, WARNING, Findings
from ssm_backbones.data_check.images import SAMPLED, missing_files, read_header, spread

_BOXES_ONLY = (
    'Add segmentations, or train on boxes alone: no mask_head (model.roi_head.mask_head=None), with_mask=False in the '
    "pipelines and metric='bbox' in the evaluators; docs/data.md has a config."
)
_SIZES = (('small', 0.0, 32.0**2), ('medium', 32.0**2, 96.0**2), ('large', 96.0**2, np.inf))


@dataclass(frozen=True)
class Needs:
    """What is made of a file.

    Attributes:
        key: Config key of the data set or the evaluator, for messages.
        dataset: Whether mmdet's CocoDataset reads the file.
        evaluator: Whether CocoMetric does.
        masks: Whether masks are needed.
        min_size: Images with a shorter side are left out.
        drops_empty: Whether images without objects are left out.
    """

    key: str
    dataset: bool = False
    evaluator: bool = False
    masks: bool = False
    min_size: int = 0
    drops_empty: bool = False


def check_structure(coco: CocoFile, findings: Findings) -> bool:
    """Check ids and fields that every reader needs, and return whether they allow further checks."""
    sound = True
    for name, entries, fields in (
        ('image', coco.images, ('id', 'file_name', 'width', 'height')),
        ('category', coco.categories, ('id', 'name')),
    ):
        if not entries:
            findings.add(ERROR, coco.path, f'has no {name}', f'Fill `{"images" if name == "image" else "categories"}`.')
            sound = False
        for field in fields:
            lacking = [entry for entry in entries if entry.get(field) is None]
            findings.add_all(
                ERROR,
                coco.path,
                lacking,
                lambda entry, name=name, field=field: (  # type: ignore[misc]
                    f'{name} {entry.get("id", entry.get("file_name", entry.get("name")))}',
                    f'has no {field!r}',
                ),
                f'Give every {name} {field!r}.',
            )
            sound &= not lacking
        for field in fields[:2]:
            values = [entry.get(field) for entry in entries]
            sound &= _check_types(coco, field, values, lambda index, name=name: f'{name} {index}', findings)  # type: ignore[misc]
        _check_doubled(coco, name, [entry.get('id') for entry in entries], findings)
    names = [entry.get('name') for entry in coco.categories]
    _check_doubled(coco, 'category named', names, findings)
    bad_sizes = [
        entry
        for entry in coco.images
        if not all(isinstance(entry.get(side), (int, float)) and entry[side] > 0 for side in ('width', 'height'))
    ]
    findings.add_all(
        ERROR,
        coco.path,
        bad_sizes if sound else [],
        lambda entry: (f'image {entry["id"]}', f'has size {entry["width"]!r} x {entry["height"]!r}'),
        'Width and height are numbers above 0.',
    )
    for name, column in (('id', coco.ids), ('image_id', coco.image_ids), ('category_id', coco.category_ids)):
        without = [index for index, value in enumerate(column) if value is None]
        findings.add_all(
            ERROR,
            coco.path,
            without,
            lambda index, name=name: (coco.describe(index), f'has no {name!r}'),  # type: ignore[misc]
            f'Give every annotation {name!r}.',
        )
        sound &= not without
        sound &= _check_types(coco, name, column, coco.describe, findings)
    _check_doubled(coco, 'annotation', coco.ids, findings)
    return sound and not bad_sizes


def check_annotations(coco: CocoFile, needs: Needs, classes: Sequence[str] | None, findings: Findings) -> None:
    """Check the annotations against what a data set or an evaluator needs."""
    if not coco.ids:
        findings.add(
            ERROR, coco.path, 'has no annotations', f'{needs.key} needs a file with annotations, or has to go.'
        )
        return
    view = _View(coco, classes)
    _check_references(view, findings)
    _check_fields(view, needs, findings)
    _check_extents(view, findings)
    if needs.dataset:
        _note_what_is_left_out(view, needs, findings)
    if needs.evaluator:
        _check_id_0(view, findings)


def check_image_files(coco: CocoFile, folder: str, turns: bool, every: bool, findings: Findings) -> None:
    """Check that the image files exist, and the sizes and orientations in their headers against the annotations'.

    Args:
        coco: The annotations.
        folder: Folder of the images.
        turns: Whether the loader turns images by their EXIF orientation.
        every: Whether to open all images, not a sample.
        findings: Collects what is found.
    """
    paths = [os.path.join(folder, str(image['file_name'])) for image in coco.images]
    missing = missing_files(paths)
    findings.add_all(
        ERROR,
        coco.path,
        missing,
        lambda path: (os.path.relpath(path, folder), f'there is no such image in {folder}'),
        'Name the folder of the images (data_prefix.img), or take what is missing out of the annotations.',
    )
    gone = set(missing)
    with_rle = {coco.image_ids[index] for index in coco.rle_sizes}
    there = [(path, image) for path, image in zip(paths, coco.images, strict=True) if path not in gone]
    turned, other = [], []
    for path, image in spread(there, every):
        header = read_header(path)
        if header is None:
            continue
        annotated = (image['width'], image['height'])
        loaded = header.loaded_size(turns)
        # A turned square, a half turn and a reflection leave the size as it is.
        kept_size = loaded == annotated and (header.orientation in (2, 3, 4) or header.width == header.height)
        if turns and header.orientation != 1 and (kept_size or loaded != annotated == (header.width, header.height)):
            turned.append((path, image, header))
        elif loaded != annotated:
            other.append((path, image, header))
    checked = '' if len(there) <= SAMPLED or every else f'; of {SAMPLED} images looked at'
    findings.add_all(
        # Run lengths of another size stop the loader.
        ERROR if any(image['id'] in with_rle for _, image, _ in turned) else WARNING,
        coco.path,
        turned,
        lambda found: (
            f'image {found[1]["id"]}',
            f'{found[0]} has EXIF orientation {found[2].orientation}: stored as {_size(found[2].frame)} (width x '
            f'height), loaded as {_size(found[2].loaded_size(turns))}, annotated as {_size_of(found[1])}{checked}',
        ),
        'If the boxes are those of the stored frame, turn the files for good or remove their tags (mogrify '
        "-auto-orient, exiftran -ai), or load with color_type='unchanged'.",
    )
    findings.add_all(
        ERROR,
        coco.path,
        other,
        lambda found: (
            f'image {found[1]["id"]}',
            f'{found[0]} is loaded as {_size(found[2].loaded_size(turns))} (width x height), annotated as '
            f'{_size_of(found[1])}{checked}',
        ),
        'Boxes are pixels of the file that is loaded: annotate that one, or scale the annotations.',
    )


def check_same_images(dataset: CocoFile, evaluator: CocoFile, key: str, chosen: bool, findings: Findings) -> None:
    """Check that an evaluator's file has the images of the data set: pycocotools matches them by their ids alone.

    Args:
        dataset: The data set's file.
        evaluator: The evaluator's file.
        key: Config key of the evaluator's file.
        chosen: Whether the data set leaves out images of its file, which the evaluator's need not have.
        findings: Where to add what is found.
    """
    # Folder and suffix may differ: the same images may be stored twice.
    names = {image['id']: _stem(image) for image in evaluator.images}
    findings.add_all(
        ERROR,
        key,
        [
            image
            for image in dataset.images
            if (image['id'] in names or not chosen) and names.get(image['id']) != _stem(image)
        ],
        lambda image: (
            f'image {image["id"]}',
            f'is {names.get(image["id"], "missing")} in {evaluator.path}, and {image["file_name"]} in {dataset.path}, '
            'on which the predictions are made',
        ),
        "Set ann_file to the data set's, data_root included.",
    )


def _stem(image: Mapping[str, Any]) -> str:
    return os.path.splitext(os.path.basename(image['file_name']))[0]


def count_objects(coco: CocoFile) -> dict[str, dict[str, int]]:
    """Return the number of objects by category and by COCO's three ranges of area."""
    names = {category['id']: str(category['name']) for category in coco.categories}
    counts = {name: dict.fromkeys((size for size, _, _ in _SIZES), 0) for name in names.values()}
    if not coco.ids:
        return counts
    view = _View(coco, None)
    areas = np.where(np.isnan(coco.areas), coco.boxes[:, 2] * coco.boxes[:, 3], coco.areas)
    for size, low, high in _SIZES:
        inside = (areas >= low) & (areas < high) & ~coco.crowd
        for number, count in Counter(view.categories[inside].tolist()).items():
            if number >= 0:
                counts[str(coco.categories[number]['name'])][size] += count
    return counts


class _View:
    """A file's annotations with positions for ids: of the image and category in the lists, -1 where there is none."""

    def __init__(self, coco: CocoFile, classes: Sequence[str] | None) -> None:
        self.coco = coco
        self.images = coco.image_indices
        self.categories = coco.category_indices
        sizes = np.array([[image['width'], image['height']] for image in coco.images] + [[np.inf, np.inf]])
        self.sizes = sizes[self.images]
        used = np.array(
            [classes is None or category['name'] in classes for category in coco.categories] + [False], bool
        )
        x, y, width, height = coco.boxes.T
        inside = (np.minimum(x + width, self.sizes[:, 0]) > np.maximum(x, 0)) & (
            np.minimum(y + height, self.sizes[:, 1]) > np.maximum(y, 0)
        )
        self.used = used[self.categories] & (self.images >= 0)
        with np.errstate(invalid='ignore'):
            self.tiny = (width < 1) | (height < 1)
            self.outside = ~inside & ~self.tiny & ~np.isnan(x)
            self.without_area = coco.areas <= 0
        # What CocoDataset keeps.
        self.kept = self.used & ~coco.ignored & inside & ~self.tiny & ~self.without_area

    def where(self, mask: np.ndarray) -> list[int]:
        return np.flatnonzero(mask).tolist()


def _check_references(view: _View, findings: Findings) -> None:
    coco = view.coco
    findings.add_all(
        ERROR,
        coco.path,
        view.where(view.categories < 0),
        lambda index: (
            coco.describe(index),
            f'has category_id {coco.category_ids[index]!r}, which no category has '
            f'({", ".join(repr(category["id"]) for category in coco.categories[:8])})',
        ),
        'Add the category, or take the annotation out: it would be passed over without a word.',
    )
    findings.add_all(
        ERROR,
        coco.path,
        view.where(view.images < 0),
        lambda index: (coco.describe(index), 'belongs to an image that is not in `images`'),
        'Add the image, or take the annotation out: it would be passed over without a word.',
    )


def _check_fields(view: _View, needs: Needs, findings: Findings) -> None:
    coco = view.coco
    first = lambda value: lambda index: (coco.describe(index), value)  # noqa: E731
    findings.add_all(
        ERROR,
        coco.path,
        sorted(coco.bad_boxes),
        lambda index: (coco.describe(index), f'has bbox {coco.bad_boxes[index]!r}'),
        'A box is a list of four numbers: x, y, width, height.',
    )
    findings.add_all(
        ERROR,
        coco.path,
        [index for index in view.where(~np.isfinite(coco.boxes).all(1)) if index not in coco.bad_boxes],
        lambda index: (coco.describe(index), f'has bbox {coco.boxes[index].tolist()}'),
        'A box is a list of four finite numbers: x, y, width, height.',
    )
    findings.add_all(
        ERROR,
        coco.path,
        view.where(~coco.has_area),
        first(f"has no 'area', which {needs.key} needs"),
        "Give every annotation 'area', of the mask in pixels, or width * height of the box.",
    )
    if needs.evaluator:
        findings.add_all(
            ERROR,
            coco.path,
            view.where(~coco.has_crowd & view.used),
            first(f"has no 'iscrowd', which {needs.key} needs, after the training"),
            "Give every annotation 'iscrowd': 0 for a single object.",
        )
    if not needs.masks:
        return
    read = view.used if needs.evaluator else view.kept
    findings.add_all(
        ERROR,
        coco.path,
        view.where(read & ((coco.masks == ABSENT) | (coco.masks == EMPTY))),
        lambda index: (
            coco.describe(index),
            f'has {"no" if coco.masks[index] == ABSENT else "an empty"} segmentation, which {needs.key} needs',
        ),
        _BOXES_ONLY,
    )
    findings.add_all(
        ERROR,
        coco.path,
        view.where(read & (coco.masks == MALFORMED)),
        first('has a segmentation that is neither a list of polygons nor run lengths (counts, size)'),
        'Write polygons as [[x1, y1, x2, y2, x3, y3, ...], ...].',
    )
    wrong = [
        index
        for index, size in coco.rle_sizes.items()
        if read[index] and list(size) != [view.sizes[index, 1], view.sizes[index, 0]]
    ]
    findings.add_all(
        ERROR,
        coco.path,
        wrong,
        lambda index: (
            coco.describe(index),
            f'has run lengths of size {coco.rle_sizes[index]}, in an image of height and width '
            f'{view.sizes[index, ::-1].astype(int).tolist()}',
        ),
        'Run lengths have the size [height, width] of their image.',
    )


def _check_extents(view: _View, findings: Findings) -> None:
    coco = view.coco
    box = lambda index: f'has bbox {coco.boxes[index].tolist()} in an image of {_size(view.sizes[index])}'  # noqa: E731
    findings.add_all(
        WARNING,
        coco.path,
        view.where(view.used & view.outside),
        lambda index: (coco.describe(index), f'{box(index)}, outside of it; mmdet leaves it out'),
        'Boxes are [x, y, width, height] in pixels of the image, from its upper left corner.',
    )
    x, y, width, height = coco.boxes.T
    over = np.maximum(np.maximum(-x, -y), np.maximum(x + width - view.sizes[:, 0], y + height - view.sizes[:, 1]))
    with np.errstate(invalid='ignore'):
        # Tools round, so that a pixel is no mistake.
        sticking_out = view.kept & (over > 1.5)
    findings.add_all(
        WARNING,
        coco.path,
        view.where(sticking_out),
        lambda index: (coco.describe(index), f'{box(index)}, partly outside of it'),
        'Boxes are [x, y, width, height], not the corners [x1, y1, x2, y2], in pixels of the image.',
    )
    shares = (coco.boxes >= 0).all(1) & (coco.boxes <= 1).all(1) & (view.images >= 0)
    if coco.ids and shares.all():
        findings.add(
            ERROR,
            coco.path,
            f'has boxes within 0 and 1 only, as {coco.boxes[0].tolist()}',
            'Boxes are in pixels, not in shares of the image.',
            coco.describe(0),
        )
    left, top, right, bottom = coco.extents.T
    with np.errstate(invalid='ignore'):
        beyond = (left < -1.5) | (top < -1.5) | (right > view.sizes[:, 0] + 1.5) | (bottom > view.sizes[:, 1] + 1.5)
        flat = (right <= left) | (bottom <= top)
        apart = (left > x + width + 2) | (right < x - 2) | (top > y + height + 2) | (bottom < y - 2)
    extent = lambda index: f'from x, y {coco.extents[index, :2].tolist()} to {coco.extents[index, 2:].tolist()}'  # noqa: E731
    for mask, text in (
        (beyond, 'beyond its image'),
        (flat, 'of no extent'),
        (apart & ~beyond, 'outside of its own bbox'),
    ):
        findings.add_all(
            WARNING,
            coco.path,
            view.where(view.kept & mask),
            lambda index, text=text: (coco.describe(index), f'has polygons {extent(index)}, {text}'),  # type: ignore[misc]
            'Polygons are lists of x and y in turns, in pixels of the image.',
        )


def _note_what_is_left_out(view: _View, needs: Needs, findings: Findings) -> None:
    coco = view.coco
    for mask, text in (
        (view.tiny, 'is narrower or lower than one pixel'),
        (view.without_area & ~view.tiny, 'has no area'),
        (coco.ignored, "has 'ignore' set"),
    ):
        findings.add_all(
            NOTE,
            coco.path,
            view.where(view.used & mask),
            lambda index, text=text: (coco.describe(index), f'{text}; mmdet leaves it out'),  # type: ignore[misc]
            'Nothing to do if that is meant.',
        )
    findings.add_all(
        NOTE,
        coco.path,
        view.where(view.kept & coco.crowd),
        lambda index: (coco.describe(index), 'is a crowd; neither trained on nor counted as missed'),
        'Nothing to do if that is meant.',
    )
    if needs.masks:
        findings.add_all(
            NOTE,
            coco.path,
            view.where(view.kept & ((coco.masks == DEGENERATE) | coco.few_points)),
            lambda index: (
                coco.describe(index),
                'has polygons of fewer than three points or an odd number of coordinates, which mmdet leaves out'
                + (': the object is ignored' if coco.masks[index] == DEGENERATE else ''),
            ),
            'Nothing to do if that is meant.',
        )
    small = [image for image in coco.images if min(image['width'], image['height']) < needs.min_size]
    findings.add_all(
        NOTE,
        coco.path,
        small,
        lambda image: (
            f'image {image["id"]}',
            f'is {image["width"]}x{image["height"]}, below filter_cfg.min_size={needs.min_size} of {needs.key}; '
            'it is left out',
        ),
        'Lower filter_cfg.min_size if it is wanted.',
    )
    # Those whose annotations are all dropped stay, as images without objects.
    filled = set(view.images[view.used].tolist())
    empty = [image for index, image in enumerate(coco.images) if index not in filled]
    if needs.drops_empty:
        findings.add_all(
            NOTE,
            coco.path,
            empty,
            lambda image: (f'image {image["id"]}', 'has no object of the classes; it is left out'),
            'Set filter_cfg.filter_empty_gt=False to train on it as background.',
        )
    gone = {image['id'] for image in small} | ({image['id'] for image in empty} if needs.drops_empty else set())
    if len(gone) >= len(coco.images):
        findings.add(
            ERROR,
            coco.path,
            f'no image is left for {needs.key}: {len(empty)} of {len(coco.images)} have no object of the classes, '
            f'{len(small)} are smaller than filter_cfg.min_size={needs.min_size}',
            'Check the classes and filter_cfg.',
        )
    elif not view.kept.any():
        findings.add(ERROR, coco.path, f'no object is left for {needs.key}', 'Check the classes, boxes and areas.')


def _check_id_0(view: _View, findings: Findings) -> None:
    coco = view.coco
    for index in view.where(view.used & np.array([id == 0 for id in coco.ids])):
        alike = int((view.categories == view.categories[index]).sum())
        findings.add(
            ERROR if alike < 100 else WARNING,
            coco.path,
            f'pycocotools takes id 0 for "no match", so that this object, one of {alike} of its class, counts as '
            'missed even by a perfect prediction',
            'Number annotations from 1: add 1 to every id.',
            coco.describe(index),
        )


def _check_types(
    coco: CocoFile, field: str, column: Sequence[Any], describe: Callable[[int], str], findings: Findings
) -> bool:
    """Check that ids can be looked up, and that names are text; return whether it is so."""
    is_id = field.endswith('id')
    sound = (int, float, str, type(None)) if is_id else (str, type(None))
    if set(map(type, column)).issubset(sound):
        return True
    findings.add_all(
        ERROR,
        coco.path,
        [index for index, value in enumerate(column) if type(value) not in sound],
        lambda index: (describe(index), f'has {field} {column[index]!r}, of type {type(column[index]).__name__}'),
        'Ids are numbers.' if is_id else 'Names are text, in quotes.',
    )
    return False


def _check_doubled(coco: CocoFile, name: str, ids: Sequence[Any], findings: Findings) -> None:
    if len(set(map(str, ids))) == len(ids):
        return
    doubled = [id for id, count in Counter(map(str, ids)).items() if count > 1]
    findings.add_all(
        ERROR,
        coco.path,
        doubled,
        lambda id: (f'{name} {id}', 'is there more than once'),
        'Every id is unique in its list; number them anew where files were put together.',
    )


def _size_of(image: Mapping[str, Any]) -> str:
    return _size((image['width'], image['height']))


def _size(size: Any) -> str:
    return f'{int(size[0])}x{int(size[1])}'
