"""The folder of a prediction: one record a line for each image, and the task's usual file made of them at the end.

``predict.json`` has the settings, ``records.jsonl`` a line for each image, ``drawn/`` the drawings, ``labels/`` a
segmentor's label maps as PNGs of class indices with the palette. Process i of several writes ``records-i.jsonl``; at
the end the first one puts all records into one file, in the order of the images. A run that is started again in the
same folder goes on after the last whole lines.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from ssm_backbones.apis.images import InputImage
from ssm_backbones.prediction.predictor import Classes
from ssm_backbones.utils.errors import CommandError
from ssm_backbones.utils.files import atomic_file, file_name, write_atomic, writing

FORMAT = 'ssm_backbones.prediction/1'
SETTINGS, RECORDS, UNREADABLE = 'predict.json', 'records.jsonl', 'unreadable.jsonl'
COCO, TABLE = 'predictions.json', 'predictions.csv'
DRAWN, LABELS = 'drawn', 'labels'
TOP = 5

Record = dict[str, Any]


class PredictionStore:
    """The folder of a prediction, for writing.

    Args:
        folder: The folder; created if missing.
        task: ``'det'``, ``'seg'`` or ``'cls'``.
        classes: Names and colours of the classes.
        settings: JSON-serialisable settings of the run. A folder of another run with other settings is rejected.
        rank: Number of the process that writes. The first one, 0, alone opens and finishes the folder.
    """

    def __init__(
        self, folder: str | os.PathLike[str], task: str, classes: Classes, settings: Mapping[str, Any], rank: int = 0
    ) -> None:
        self.folder = Path(folder)
        self._own_records = self.folder / (f'records-{rank}.jsonl' if rank else RECORDS)
        self.task, self.classes = task, classes
        self._settings = dict(format=FORMAT, task=task, classes=list(classes.names), **settings)

    def open(self) -> None:
        """Create the folder, or check that it is of the same run.

        Raises:
            CommandError: If the folder holds another run's results or cannot be written.
        """
        path = self.folder / SETTINGS
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                write_atomic(path, json.dumps(self._settings, indent=1) + '\n')
                (self.folder / RECORDS).touch()
                return
            held = _json(path)
            for key, value in self._settings.items():
                if held.get(key) != value:
                    what = 'another model (its fingerprint differs)' if key == 'fingerprint' else f'another {key}'
                    raise CommandError(
                        f'out {self.folder} holds predictions of {what}. Name another folder, or remove that one.'
                    )
            for path in self._record_files():
                _drop_torn_line(path)

    def done(self) -> set[str]:
        """Return the ids of the images that any process has finished."""
        return {record['id'] for record in self.records()}

    def add(self, image: InputImage, size: Sequence[int], sample: Any, drawn: np.ndarray | None) -> None:
        """Write an image's drawing, label map and record.

        Args:
            image: The image.
            size: Its height and width.
            sample: The host library's data sample.
            drawn: uint8 RGB (H, W, 3), or None.

        Raises:
            CommandError: If the folder cannot be written, or the disk is full.
        """
        record: Record = dict(id=image.id, path=os.path.abspath(image.path), size=[int(size[0]), int(size[1])])
        with writing(self.folder):
            if drawn is not None:
                self._save(DRAWN, image.id, drawn)
            if self.task == 'seg':
                record['label_map'] = self._save(LABELS, image.id, _numpy(sample.pred_sem_seg.data)[0])
            else:
                record.update(_objects(sample) if self.task == 'det' else _scores(sample))
            with open(self._own_records, 'a', encoding='utf-8') as file:
                file.write(json.dumps(record) + '\n')

    def _save(self, kind: str, id: str, pixels: np.ndarray) -> str:
        from PIL import Image

        name = f'{kind}/{output_name(id, kind)}'
        target = self.folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if kind == LABELS and len(self.classes.names) > 256:
            picture = Image.fromarray(pixels.astype(np.uint16))
        else:
            picture = Image.fromarray(pixels.astype(np.uint8))
            if kind == LABELS:
                picture.putpalette([value for colour in self.classes.palette for value in colour])
        with atomic_file(target) as partial:
            picture.save(partial, format='JPEG' if name.endswith('.jpg') else 'PNG', quality=92)
        return name

    def _record_files(self) -> list[Path]:
        return [self.folder / RECORDS, *sorted(self.folder.glob('records-*.jsonl'))]

    def records(self) -> Iterator[Record]:
        """Yield the records, in the order of the images once the run is finished."""
        for path in self._record_files():
            with open(path, encoding='utf-8') as file:
                for line in file:
                    yield json.loads(line)

    def _sort_records(self, order: Sequence[InputImage]) -> None:
        """Put the records of all processes into one file: those of earlier runs' images, then these images in order."""
        files = self._record_files()
        places: dict[str, tuple[int, int]] = {}
        for number, path in enumerate(files):
            start = 0
            with open(path, 'rb') as file:
                for line in file:
                    places[json.loads(line)['id']] = number, start
                    start += len(line)
        given = {image.id for image in order}
        ids = [id for id in places if id not in given] + [image.id for image in order if image.id in places]
        if len(files) == 1 and ids == list(places):
            return
        with contextlib.ExitStack() as stack:
            sources = [stack.enter_context(open(path, 'rb')) for path in files]
            target = stack.enter_context(open(stack.enter_context(atomic_file(files[0])), 'wb'))
            for id in ids:
                number, start = places[id]
                sources[number].seek(start)
                target.write(sources[number].readline())
        for path in files[1:]:
            path.unlink()

    def finish(
        self, order: Sequence[InputImage], categories: Sequence[Mapping[str, Any]], image_ids: Mapping[str, int]
    ) -> None:
        """Write the task's file of all results.

        Args:
            order: All images, in the order of the file.
            categories: COCO's categories, in the order of the classes.
            image_ids: COCO's id of each image, by its id here.

        Raises:
            CommandError: If the folder cannot be written, or the disk is full.
        """
        with writing(self.folder):
            self._sort_records(order)
            if self.task == 'det':
                self._write_coco(order, categories, image_ids)
            elif self.task == 'cls':
                self._write_table(order)

    def files(self) -> list[Path]:
        """Return the paths of what users look for."""
        named = {'det': COCO, 'seg': LABELS, 'cls': TABLE}[self.task]
        return [self.folder / name for name in (named, DRAWN) if (self.folder / name).exists()]

    def _write_coco(
        self, order: Sequence[InputImage], categories: Sequence[Mapping[str, Any]], image_ids: Mapping[str, int]
    ) -> None:
        """Write a COCO file whose annotations have scores, without holding all of it in memory."""
        sizes = {record['id']: record['size'] for record in self.records()}
        images = [
            dict(id=image_ids[image.id], file_name=image.id, height=sizes[image.id][0], width=sizes[image.id][1])
            for image in order
            if image.id in sizes
        ]
        with atomic_file(self.folder / COCO) as partial, open(partial, 'w', encoding='utf-8') as file:
            file.write(f'{{"images": {json.dumps(images)},\n"categories": {json.dumps(list(categories))},\n')
            file.write('"annotations": [')
            count = 0
            for record in self.records():
                if record['id'] not in image_ids:
                    continue
                for annotation in _annotations(record, categories):
                    count += 1
                    annotation.update(id=count, image_id=image_ids[record['id']])
                    file.write((',\n' if count > 1 else '\n') + json.dumps(annotation))
            file.write(']}\n')

    def _write_table(self, order: Sequence[InputImage]) -> None:
        records = {record['id']: record for record in self.records()}
        columns = min(TOP, len(self.classes.names))
        with atomic_file(self.folder / TABLE) as partial, open(partial, 'w', encoding='utf-8', newline='') as file:
            table = csv.writer(file)
            table.writerow(
                ['image', *(f'{what}_{place + 1}' for place in range(columns) for what in ('class', 'score'))]
            )
            for image in order:
                if image.id in records:
                    record = records[image.id]
                    pairs = zip(record['labels'], record['scores'], strict=True)
                    table.writerow(
                        [image.id, *(cell for label, score in pairs for cell in (self.classes.names[label], score))]
                    )

    def write_unreadable(self, failures: Sequence[Mapping[str, str]]) -> None:
        """Write the list of images that could not be predicted on, or remove an earlier run's if there are none."""
        path = self.folder / UNREADABLE
        with writing(self.folder):
            if failures:
                write_atomic(path, ''.join(json.dumps(failure) + '\n' for failure in failures))
            else:
                path.unlink(missing_ok=True)


def output_name(id: str, kind: str) -> str:
    """Return the name of an image's drawing (its own if that is a JPEG's or a PNG's) or label map (a PNG)."""
    name = file_name(id)
    suffix = PurePosixPath(name).suffix.lower()
    if kind == DRAWN and suffix in ('.jpg', '.png'):
        return name[: -len(suffix)] + suffix
    return f'{name[: -len(suffix)] if suffix else name}.png'


def _drop_torn_line(path: Path) -> None:
    """Remove what a killed run left behind the last whole line."""
    with open(path, 'ab+') as file:
        file.seek(0)
        data = file.read()
        file.truncate(data.rfind(b'\n') + 1)


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding='utf-8'))
    except ValueError as error:
        raise CommandError(f'{path} is damaged: {error}') from error


def _objects(sample: Any) -> Record:
    from mmdet.structures.mask import encode_mask_results

    found = sample.pred_instances
    record = dict(
        boxes=_rounded(found.bboxes, 2), scores=_rounded(found.scores, 5), labels=_numpy(found.labels).tolist()
    )
    if 'masks' in found:
        masks = found.masks if isinstance(found.masks, list) else encode_mask_results(found.masks)
        record['masks'] = [
            dict(
                size=list(mask['size']),
                counts=mask['counts'] if isinstance(mask['counts'], str) else mask['counts'].decode(),
            )
            for mask in masks
        ]
    return record


def _scores(sample: Any) -> Record:
    scores = _numpy(sample.pred_score)
    best = np.argsort(-scores, kind='stable')[:TOP]
    return dict(labels=best.tolist(), scores=[round(float(scores[label]), 5) for label in best])


def _annotations(record: Record, categories: Sequence[Mapping[str, Any]]) -> Iterator[Record]:
    from pycocotools import mask as coco

    for place, (left, top, right, bottom) in enumerate(record['boxes']):
        annotation = dict(
            category_id=categories[record['labels'][place]]['id'],
            bbox=[left, top, round(right - left, 2), round(bottom - top, 2)],
            score=record['scores'][place],
            area=round((right - left) * (bottom - top), 2),
            iscrowd=0,
        )
        if 'masks' in record:
            mask = record['masks'][place]
            annotation.update(segmentation=mask, area=int(coco.area(mask)))
        yield annotation


def _numpy(tensor: Any) -> np.ndarray:
    return tensor.numpy() if hasattr(tensor, 'numpy') else np.asarray(tensor)


def _rounded(tensor: Any, digits: int) -> list[Any]:
    return np.round(_numpy(tensor).astype(np.float64), digits).tolist()
