"""A file of COCO annotations as columns, one entry for each annotation."""

from __future__ import annotations

import json
from array import array
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

_IMAGE_KEYS = ('id', 'file_name', 'width', 'height')
_NAN = float('nan')
# Coordinates that are held at a time.
_COORDINATES = 4_000_000

# Kinds of segmentation.
ABSENT, EMPTY, POLYGONS, DEGENERATE, RLE, MALFORMED = range(6)


@dataclass
class CocoFile:
    """A file of COCO annotations without what the check does not need.

    Attributes:
        path: The file.
        images: Entries of ``images`` without other keys than ``id``, ``file_name``, ``width`` and ``height``.
        categories: Entries of ``categories``.
        ids, image_ids, category_ids: Of the annotations; None if missing.
        boxes: (N, 4) float64, ``x, y, width, height``; NaN if the annotation has no box of four numbers.
        bad_boxes: The value of ``bbox`` by index, where it is not a list of four numbers.
        areas: (N,) float64; NaN if missing or not a number.
        has_area, has_crowd, crowd, ignored: (N,) bool.
        masks: (N,) uint8, the kind of segmentation.
        extents: (N, 4) float32, smallest x and y, largest x and y of the polygons; NaN for others.
        few_points: (N,) bool, some polygons have fewer than three points or an odd number of coordinates.
        rle_sizes: ``size`` of run lengths by index.
        sample: An image's annotations as they are in the file, for a trial of the pipeline.
    """

    path: Path
    images: list[dict[str, Any]] = field(default_factory=list)
    categories: list[dict[str, Any]] = field(default_factory=list)
    ids: list[Any] = field(default_factory=list)
    image_ids: list[Any] = field(default_factory=list)
    category_ids: list[Any] = field(default_factory=list)
    boxes: np.ndarray = field(default_factory=lambda: np.zeros((0, 4)))
    bad_boxes: dict[int, Any] = field(default_factory=dict)
    areas: np.ndarray = field(default_factory=lambda: np.zeros(0))
    has_area: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    has_crowd: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    crowd: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    ignored: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    masks: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint8))
    extents: np.ndarray = field(default_factory=lambda: np.zeros((0, 4), np.float32))
    few_points: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    rle_sizes: dict[int, Any] = field(default_factory=dict)
    sample: list[dict[str, Any]] = field(default_factory=list)

    @cached_property
    def image_indices(self) -> np.ndarray:
        """(N,) positions of the annotations' images in ``images``; -1 where there is none."""
        return _positions(self.images, self.image_ids)

    @cached_property
    def category_indices(self) -> np.ndarray:
        """(N,) positions of the annotations' categories in ``categories``; -1 where there is none."""
        return _positions(self.categories, self.category_ids)

    def describe(self, index: int) -> str:
        """Name an annotation for a message."""
        return f'annotation {self.ids[index]} of image {self.image_ids[index]}'


class _File(msgspec.Struct):
    images: list[dict[str, Any]] = []
    annotations: list[msgspec.Raw] = []
    categories: list[dict[str, Any]] = []


class _Annotation(msgspec.Struct):
    id: Any = None
    image_id: Any = None
    category_id: Any = None
    bbox: Any = None
    area: Any = None
    iscrowd: Any = None
    ignore: Any = None
    segmentation: Any = None


def read_coco(path: str | Path) -> CocoFile:
    """Read a file of COCO annotations.

    The annotations of COCO's training set are 450 MB of JSON, of which Python would make several gigabytes of objects.
    Here the text is held, and one annotation's objects at a time. What is not strictly JSON (NaN, Infinity) is read
    by Python's json, with all of its objects.

    Raises:
        ValueError: If the file is not a JSON object of COCO's form. The message gives the place.
    """
    with open(path, 'rb') as file:
        content = file.read()
    try:
        return _read_strictly(Path(path), content)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        # json says where the error is, or reads it.
        return _read_by_json(Path(path), content)


def _read_strictly(path: Path, content: bytes) -> CocoFile:
    file = msgspec.json.decode(content, type=_File)
    coco = CocoFile(path, [_image(entry) for entry in file.images], file.categories)
    columns = _Columns(coco)
    decode = msgspec.json.Decoder(_Annotation).decode
    for text in file.annotations:
        if columns.append(decode(text)):
            coco.sample.append(msgspec.json.decode(text))
    columns.finish()
    return coco


def _read_by_json(path: Path, content: bytes) -> CocoFile:
    try:
        file = json.loads(content.decode('utf-8'))
    except RecursionError as error:
        raise ValueError('values are nested too deeply') from error
    if not isinstance(file, dict):
        raise ValueError(f'has to be an object with images, annotations and categories, found {_short(file)}')
    for key in ('images', 'annotations', 'categories'):
        entries = file.setdefault(key, [])
        if not isinstance(entries, list):
            raise ValueError(f'{key} has to be a list of objects, found {_short(entries)}')
        for index, entry in enumerate(entries):
            if not isinstance(entry, dict):
                raise ValueError(f'{key} has to be a list of objects, found {_short(entry)} at index {index}')
    coco = CocoFile(path, [_image(entry) for entry in file['images']], file['categories'])
    columns = _Columns(coco)
    for entry in file['annotations']:
        known = {name: entry[name] for name in _Annotation.__struct_fields__ if name in entry}
        if columns.append(_Annotation(**known)):
            coco.sample.append(entry)
    columns.finish()
    return coco


def _positions(entries: list[dict[str, Any]], ids: list[Any]) -> np.ndarray:
    known = {entry['id']: index for index, entry in enumerate(entries)}
    return np.fromiter((known.get(id, -1) for id in ids), np.int64, len(ids))


def _image(entry: dict[str, Any]) -> dict[str, Any]:
    return {name: entry[name] for name in _IMAGE_KEYS if name in entry}


class _Columns:
    """Appends annotations; what is written here runs once for each of a million annotations."""

    def __init__(self, coco: CocoFile) -> None:
        self.coco = coco
        self.boxes, self.areas = array('d'), array('d')
        self.has_area, self.has_crowd, self.crowd = bytearray(), bytearray(), bytearray()
        self.ignored, self.masks, self.few_points = bytearray(), bytearray(), bytearray()
        # Of the polygons that are not reduced to their extents yet.
        self.coordinates, self.lengths, self.owners = array('f'), array('q'), array('q')
        self.extents: list[tuple[np.ndarray, np.ndarray]] = []

    def append(self, annotation: _Annotation) -> bool:
        """Append an annotation and return whether it belongs to the sample: those of the first one's image."""
        coco = self.coco
        index = len(coco.ids)
        coco.ids.append(annotation.id)
        coco.image_ids.append(annotation.image_id)
        coco.category_ids.append(annotation.category_id)
        box = annotation.bbox
        try:
            x, y, width, height = box
            self.boxes.extend(array('d', (x, y, width, height)))
        except (TypeError, ValueError, OverflowError):
            del self.boxes[4 * index :]
            self.boxes.extend((_NAN, _NAN, _NAN, _NAN))
            coco.bad_boxes[index] = box
        area = annotation.area
        try:
            self.areas.append(area)
            self.has_area.append(True)
        except (TypeError, OverflowError):
            self.areas.append(_NAN)
            self.has_area.append(False)
        crowd = annotation.iscrowd
        self.has_crowd.append(crowd is not None)
        self.crowd.append(bool(crowd))
        self.ignored.append(bool(annotation.ignore))
        self._append_mask(index, annotation.segmentation)
        return annotation.image_id == coco.image_ids[0]

    def _append_mask(self, index: int, value: Any) -> None:
        few = False
        if isinstance(value, list) and value:
            kind, few = self._append_polygons(index, value)
        elif isinstance(value, dict):
            counts, size = value.get('counts'), value.get('size')
            sound = isinstance(counts, (list, str)) and isinstance(size, list) and len(size) == 2
            kind = RLE if sound else MALFORMED
            if sound:
                self.coco.rle_sizes[index] = size
        else:
            kind = ABSENT if value is None else EMPTY if value == [] else MALFORMED
        self.masks.append(kind)
        self.few_points.append(few)

    def _append_polygons(self, index: int, polygons: list[Any]) -> tuple[int, bool]:
        coordinates = self.coordinates
        held, few, kept = len(coordinates), False, 0
        try:
            for polygon in polygons:
                length = len(polygon)
                if length < 6 or length % 2:
                    few = True
                    continue
                coordinates.extend(array('f', polygon))
                self.lengths.append(length)
                self.owners.append(index)
                kept += 1
        except (TypeError, OverflowError):
            del coordinates[held:]
            del self.lengths[len(self.lengths) - kept :], self.owners[len(self.owners) - kept :]
            return MALFORMED, False
        if len(coordinates) > _COORDINATES:
            self._reduce()
        return (POLYGONS if kept else DEGENERATE), few

    def _reduce(self) -> None:
        """Reduce polygons to their extents."""
        if not self.lengths:
            return
        points = np.frombuffer(self.coordinates, np.float32).reshape(-1, 2)
        ends = np.cumsum(np.frombuffer(self.lengths, np.int64)) // 2
        starts = np.concatenate([[0], ends[:-1]])
        extents = np.hstack([np.minimum.reduceat(points, starts), np.maximum.reduceat(points, starts)])
        self.extents.append((np.array(self.owners), extents))
        self.coordinates, self.lengths, self.owners = array('f'), array('q'), array('q')

    def finish(self) -> None:
        coco = self.coco
        coco.boxes = np.frombuffer(self.boxes, np.float64).reshape(-1, 4)
        coco.areas = np.frombuffer(self.areas, np.float64)
        coco.masks = np.frombuffer(self.masks, np.uint8)
        for name in ('has_area', 'has_crowd', 'crowd', 'ignored', 'few_points'):
            setattr(coco, name, np.frombuffer(getattr(self, name), np.uint8).astype(bool))
        self._reduce()
        coco.extents = np.full((len(coco.ids), 4), np.nan, np.float32)
        for owners, extents in self.extents:
            # NaN yields to numbers.
            np.fmin.at(coco.extents[:, :2], owners, extents[:, :2])
            np.fmax.at(coco.extents[:, 2:], owners, extents[:, 2:])


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f'{text[:57]}...'
