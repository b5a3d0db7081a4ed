"""Predict on images, folders and videos into a folder, for ``tools/predict.py``."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset

from ssm_backbones.apis.batches import batches
from ssm_backbones.apis.checks import leaf_datasets
from ssm_backbones.apis.images import MAX_PIXELS, SPLITS, InputImage, UnreadableImage, find_images
from ssm_backbones.apis.model import model_fingerprint
from ssm_backbones.apis.processes import Processes, processes
from ssm_backbones.prediction.drawing import picture
from ssm_backbones.prediction.predictor import Pipeline, Predictor, Sizes
from ssm_backbones.prediction.store import DRAWN, LABELS, PredictionStore, output_name
from ssm_backbones.prediction.videos import Video, is_video
from ssm_backbones.utils.errors import CommandError
from ssm_backbones.utils.files import locked
from ssm_backbones.utils.progress import progress
from ssm_backbones.utils.signals import interrupt_on_sigterm


@dataclass(frozen=True)
class PredictOptions:
    """Options of ``tools/predict.py``.

    Attributes:
        config: The config file.
        checkpoint: The checkpoint of its model.
        inputs: Images, see :func:`~ssm_backbones.apis.images.find_images`, and videos.
        out: The folder to write to.
        image_folder: Folder of the images of a COCO file.
        window: As in :class:`~ssm_backbones.prediction.Predictor`; one number is a square's side.
        overlap: As there.
        score_thr: Least score of objects that are drawn. The files contain all.
        draw: Whether to draw the predictions.
        batch_size: Maximum batch size; only images of one size form a batch.
        workers: Processes that read images.
        device: ``'cpu'``, ``'cuda'`` or ``'cuda:1'``; by default a GPU where there is one.
        max_pixels: Larger images are not read.
        cfg_options: Values that replace the config's, by dotted key.
        launcher: ``'none'``, or ``'pytorch'`` if torchrun started several processes, which share the images.
    """

    config: str
    checkpoint: str
    inputs: Sequence[str]
    out: str
    image_folder: str | None = None
    window: Sequence[int] | None = None
    overlap: int | None = None
    score_thr: float = 0.3
    draw: bool = True
    batch_size: int = 8
    workers: int = 2
    device: str | None = None
    max_pixels: int = MAX_PIXELS
    cfg_options: Mapping[str, Any] = field(default_factory=dict)
    launcher: str = 'none'


@dataclass(frozen=True)
class PredictResult:
    """Result of a run, over all processes.

    Attributes:
        predicted: Images that this run predicted on.
        kept: Images that earlier runs had predicted on.
        unreadable: For each image that could not be read, its id, path and the reason.
        files: What was written: the file of all results or the folder of label maps, and the drawings.
    """

    predicted: int
    kept: int
    unreadable: list[dict[str, str]]
    files: list[Path]


@dataclass
class _Item:
    """A loaded image with what the model is given, or the reason why it could not be read."""

    image: InputImage
    size: tuple[int, int] = (0, 0)
    shown: np.ndarray | None = None
    data: dict[str, Any] | None = None
    loaded: dict[str, Any] | None = None
    reason: str = ''


class _Images(Dataset):
    """Data set of prepared images; an unreadable image gives its reason instead of raising."""

    def __init__(self, images: Sequence[InputImage], read: _Reader) -> None:
        self.images, self.read = images, read

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> _Item:
        return self.read(self.images[index], self.images[index].path)


def predict(options: PredictOptions) -> PredictResult:
    """Predict on the images and frames that are not in the folder yet, and write what the task's tools read.

    Raises:
        CommandError: If the config, the checkpoint, an input, an option or the folder is invalid. Unreadable images do
            not raise; they are listed in the result.
    """
    _check_options(options)
    with processes(options.launcher, options.device) as group:
        return _predict(options, group)


def _predict(options: PredictOptions, group: Processes) -> PredictResult:
    try:
        predictor = Predictor(
            options.config,
            options.checkpoint,
            str(group.device),
            window=options.window,
            overlap=options.overlap,
            batch_size=options.batch_size,
            score_thr=options.score_thr,
            max_pixels=options.max_pixels,
            cfg_options=options.cfg_options,
        )
    except ValueError as error:
        raise CommandError(str(error)) from error
    videos = [Video(given) for given in options.inputs if is_video(given)]
    found = [
        image
        for given in options.inputs
        if not is_video(given)
        for image in find_images(given, predictor.cfg, options.image_folder if given.endswith('.json') else None)
    ]
    images = [*found, *(image for video in videos for image in video.images())]
    _check_names(images)
    categories, image_ids = _coco_ids(predictor, options.inputs, images)
    settings = dict(
        fingerprint=model_fingerprint(predictor.model, predictor.cfg, predictor.pipeline.steps),
        window=None if predictor.window is None else list(predictor.window),
        overlap=predictor.overlap,
    )
    store = PredictionStore(options.out, predictor.task, predictor.classes, settings, group.rank)
    failures: list[dict[str, str]] = []
    first = group.rank == 0
    with contextlib.ExitStack() as stack:

        def open_folder() -> None:
            stack.enter_context(locked(options.out, 'prediction'))
            store.open()

        group.in_first(open_folder)
        done = store.done()
        group.wait()

        def own(candidates: Sequence[InputImage]) -> list[InputImage]:
            return group.share([image for image in candidates if image.id not in done], options.batch_size)

        todo, frames = own(found), [own(video.images()) for video in videos]
        left = len(todo) + sum(map(len, frames))
        with progress('predicting', left, disable=not first) as advance, interrupt_on_sigterm():
            predicted = _run(predictor, _read_images(predictor, todo, options), store, options, failures, advance)
            for video, chosen in zip(videos, frames, strict=True):
                items = _read_frames(predictor, video, {image.id for image in chosen}, options)
                predicted += _run(predictor, items, store, options, failures, advance)
        predicted = sum(group.gather([predicted]))
        order = {image.id: place for place, image in enumerate(images)}
        failures = sorted(group.gather(failures), key=lambda failure: order[failure['id']])
        if first:
            for video in videos if options.draw else []:
                folder = Path(options.out, DRAWN, video.name)
                video.write(folder, folder.with_suffix('.mp4'))
            store.finish(images, categories, image_ids)
            store.write_unreadable(failures)
        group.wait()
    kept = sum(image.id in done for image in images)
    return PredictResult(predicted, kept, failures, store.files())


def _check_options(options: PredictOptions) -> None:
    for name, least in (('batch_size', 1), ('workers', 0), ('max_pixels', 1)):
        value = getattr(options, name)
        if value < least:
            raise CommandError(f'{name} must be at least {least}, got {value}.')
    if not 0 <= options.score_thr <= 1:
        raise CommandError(f'score_thr must be between 0 and 1, got {options.score_thr}.')
    if os.path.isfile(options.out):
        raise CommandError(f'out {options.out} is a file; name a folder.')


def _check_names(images: Sequence[InputImage]) -> None:
    """Reject images whose results would be written to one file."""
    for kind in (DRAWN, LABELS):
        seen: dict[str, str] = {}
        for image in images:
            name = output_name(image.id, kind)
            if name in seen:
                raise CommandError(
                    f'the results of {image.id} and {seen[name]} would both be written to {kind}/{name}. '
                    'Rename one, or predict on them into different folders.'
                )
            seen[name] = image.id


def _coco_ids(
    predictor: Predictor, inputs: Sequence[str], images: Sequence[InputImage]
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Return COCO's categories in the order of the classes, and its image ids by ours.

    Those of the annotation file, if the one input is one or a split that has one; else both are counted from 1, since
    pycocotools takes an id of 0 for none.
    """
    names = predictor.classes.names
    counted = [dict(id=place + 1, name=name) for place, name in enumerate(names)]
    path = _annotation_file(predictor, inputs)
    if path is None:
        return counted, {image.id: place + 1 for place, image in enumerate(images)}
    held = {each['name']: each['id'] for each in json.loads(Path(path).read_text(encoding='utf-8'))['categories']}
    if not set(names) <= held.keys():
        missing = ', '.join(name for name in names if name not in held)
        raise CommandError(f'{path} has no category {missing}, which the model predicts; it has {", ".join(held)}.')
    return [dict(id=held[name], name=name) for name in names], {image.id: int(image.id) for image in images}


def _annotation_file(predictor: Predictor, inputs: Sequence[str]) -> str | None:
    if predictor.task != 'det' or len(inputs) != 1:
        return None
    if inputs[0].endswith('.json'):
        return inputs[0]
    if inputs[0] not in SPLITS:
        return None
    for _, settings in leaf_datasets(predictor.cfg[f'{inputs[0]}_dataloader'].dataset):
        path = os.path.join(settings.get('data_root') or '', settings.get('ann_file') or '')
        return path if path.endswith('.json') else None
    return None


@dataclass(frozen=True)
class _Reader:
    """Loads and prepares an image; one that cannot be read gives its reason instead of raising."""

    pipeline: Pipeline
    sizes: Sizes
    draw: bool

    def __call__(self, image: InputImage, given: str | np.ndarray) -> _Item:
        try:
            loaded = self.pipeline.load(given, self.sizes.max_pixels)
            size = loaded['img'].shape[:2]
            shown = picture(loaded['img']) if self.draw else None
            if self.sizes.is_divided(size):
                return _Item(image, size, shown, loaded=loaded)
            self.sizes.check(size)
            return _Item(image, size, shown, data=self.pipeline.prepare(loaded))
        except UnreadableImage as error:
            return _Item(image, reason=str(error))
        except Exception as error:
            # Transforms raise arbitrary errors for damaged files; the other images are still predicted on.
            return _Item(image, reason=f'{type(error).__name__}: {str(error).strip()}')


def _read_images(predictor: Predictor, images: Sequence[InputImage], options: PredictOptions) -> Iterable[_Item]:
    dataset = _Images(images, _Reader(predictor.pipeline, predictor.sizes, options.draw))
    # A huge image stays in this process, where there is one at a time.
    workers = 0 if predictor.window is not None else min(options.workers, len(images))
    return DataLoader(
        dataset,
        batch_size=None,
        num_workers=workers,
        # The next batch is read completely while one is computed.
        prefetch_factor=max(2, -(-2 * options.batch_size // workers)) if workers else None,
    )


def _read_frames(predictor: Predictor, video: Video, chosen: set[str], options: PredictOptions) -> Iterator[_Item]:
    read = _Reader(predictor.pipeline, predictor.sizes, options.draw)
    for image, frame in zip(video.images(), video, strict=False):
        # Frames in between are decoded, too: a jump to one may land on another.
        if image.id in chosen:
            yield read(image, frame)


def _run(
    predictor: Predictor,
    items: Iterable[_Item],
    store: PredictionStore,
    options: PredictOptions,
    failures: list[dict[str, str]],
    advance: Callable[[float], None],
) -> int:
    """Predict on items and store the results; return how many there were."""
    count = 0

    def store_result(item: _Item, result: Any) -> None:
        nonlocal count
        drawn = None if item.shown is None else predictor.drawer(item.shown, result)
        store.add(item.image, item.size, result, drawn)
        count += 1

    def prepared() -> Iterator[_Item]:
        for item in items:
            if item.loaded is not None:
                result = predictor.predict_loaded(item.loaded, advance)
                item.loaded = None
                store_result(item, result)
            elif item.data is None:
                failures.append(dict(id=item.image.id, path=item.image.path, reason=item.reason))
                advance(1)
            else:
                yield item

    for batch in batches(prepared(), options.batch_size):
        results = predictor.predict_batch([item.data for item in batch if item.data is not None])
        for item, result in zip(batch, results, strict=True):
            store_result(item, result)
        advance(len(batch))
    return count
