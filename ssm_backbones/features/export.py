"""Export the feature maps of images, with the config's own preprocessing, for ``tools/export_features.py``.

Images are batched only with images of the same size, so that no map depends on the other images of its batch, and an
export that was interrupted and resumed equals one that was not.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from mmengine.config import Config
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ssm_backbones.apis.batches import batches
from ssm_backbones.apis.config import load_config
from ssm_backbones.apis.images import (
    MAX_PIXELS,
    InputImage,
    UnreadableImage,
    check_readable,
    find_images,
    test_pipeline,
)
from ssm_backbones.apis.model import FeatureExtractor, build_extractor, fingerprint
from ssm_backbones.apis.processes import Processes, processes
from ssm_backbones.features.placement import PlacedPipeline, Placement, PlacementError
from ssm_backbones.features.store import DTYPES, FeatureStore, Record
from ssm_backbones.utils.errors import CommandError
from ssm_backbones.utils.files import locked
from ssm_backbones.utils.memory import explain_lack_of_memory
from ssm_backbones.utils.progress import progress
from ssm_backbones.utils.signals import interrupt_on_sigterm

_PROBE = 256


@dataclass(frozen=True)
class ExportOptions:
    """Options of ``tools/export_features.py``.

    Attributes:
        config: The config file.
        checkpoint: The checkpoint of its model, or of the backbone alone, official ones too.
        input: The images, see :func:`~ssm_backbones.apis.images.find_images`.
        out: The folder to write to.
        image_folder: Folder of the images of a COCO file.
        neck: Whether to export the maps of the model's neck.
        levels: Indices of the maps to write among those of the backbone or neck; all by default.
        dtype: Stored dtype, ``'fp32'``, ``'fp16'`` or ``'bf16'``; the computation is in float32.
        shard_size: Images per file; 0 for one file per image.
        batch_size: Maximum batch size; only images of one size form a batch.
        workers: Processes that read images.
        device: ``'cpu'``, ``'cuda'`` or ``'cuda:1'``; by default a GPU where there is one.
        max_pixels: Images with more pixels are not read.
        preview: Draw each image next to its levels.
        cfg_options: Values that replace the config's, by dotted key.
        launcher: ``'none'``, or ``'pytorch'`` if torchrun started several processes, which share the images.
    """

    config: str
    checkpoint: str
    input: str
    out: str
    image_folder: str | None = None
    neck: bool = False
    levels: Sequence[int] | None = None
    dtype: str = 'fp32'
    shard_size: int = 0
    batch_size: int = 8
    workers: int = 2
    device: str | None = None
    max_pixels: int = MAX_PIXELS
    preview: bool = False
    cfg_options: Mapping[str, Any] = field(default_factory=dict)
    launcher: str = 'none'


@dataclass(frozen=True)
class ExportResult:
    """Result of an export, over all processes.

    Attributes:
        exported: Images exported by this run.
        kept: Images exported by earlier runs.
        unreadable: For each image that could not be exported, its id, path and the reason.
        levels: Stride and channels of each level, as in ``export.json``.
        fingerprint: Hash of the model and its preprocessing.
    """

    exported: int
    kept: int
    unreadable: list[dict[str, str]]
    levels: list[dict[str, Any]]
    fingerprint: str


@dataclass
class _Sample:
    """An image after the pipeline with its placement, or the reason why it could not be read."""

    image: InputImage
    data: dict[str, Any] | None = None
    placement: Placement | None = None
    reason: str = ''

    def pin_memory(self) -> _Sample:
        """Pin the image's pixels for the loader, for asynchronous copies to a GPU."""
        if self.data is not None:
            self.data['inputs'] = self.data['inputs'].pin_memory()
        return self


class _Images(Dataset):
    """Data set of images after the pipeline; an unreadable image gives its reason instead of raising."""

    def __init__(self, images: Sequence[InputImage], pipeline: PlacedPipeline, max_pixels: int) -> None:
        self.images = images
        self.pipeline = pipeline
        self.max_pixels = max_pixels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> _Sample:
        image = self.images[index]
        try:
            check_readable(image.path, self.max_pixels)
            data, placement = self.pipeline(image.path, image.id, index)
        except (UnreadableImage, PlacementError) as error:
            return _Sample(image, reason=str(error))
        except Exception as error:
            # Decoders and transforms raise arbitrary errors for damaged files; the other images are still exported.
            return _Sample(image, reason=f'{type(error).__name__}: {str(error).strip()}')
        return _Sample(image, data, placement)


def export_features(options: ExportOptions) -> ExportResult:
    """Export the feature maps of images that are not in the folder yet.

    Raises:
        CommandError: If the config, the checkpoint, the input or the folder is invalid. Unreadable images do not raise;
            they are listed in the result.
    """
    _check_options(options)
    cfg = load_config(options.config, options.cfg_options)
    images = find_images(options.input, cfg, options.image_folder)
    pipeline = PlacedPipeline(test_pipeline(cfg), cfg.default_scope)
    with processes(options.launcher, options.device) as group:
        return _export(options, cfg, images, pipeline, group)


def _export(
    options: ExportOptions, cfg: Config, images: Sequence[InputImage], pipeline: PlacedPipeline, group: Processes
) -> ExportResult:
    extractor = build_extractor(cfg, options.checkpoint, options.neck)
    levels = describe_levels(extractor, options.levels)
    extractor = extractor.to(group.device)
    # The preprocessor stores its device, which moving its parent does not update.
    extractor.preprocessor.to(group.device)
    mark = fingerprint(extractor, cfg, test_pipeline(cfg))
    settings = dict(fingerprint=mark, dtype=options.dtype, neck=options.neck, levels=levels)
    store = FeatureStore(options.out, settings, options.shard_size)
    first = group.rank == 0
    with contextlib.ExitStack() as stack:

        def open_folder() -> None:
            stack.enter_context(locked(options.out))
            store.open()

        group.in_first(open_folder)
        done = store.done()
        _check_same_images(options.out, images, done)
        todo = group.share([image for image in images if image.id not in done], options.batch_size)
        dataset = _Images(todo, pipeline, options.max_pixels)
        group.wait()
        failures = group.gather(_run(extractor, dataset, store, levels, options, group, mark))
        order = {image.id: place for place, image in enumerate(images)}
        failures.sort(key=lambda failure: order[failure['id']])
        if first:
            store.write_index([image.id for image in images])
            store.write_unreadable(failures)
        if options.preview:
            _draw_previews(options, images[group.rank :: group.world], first)
        group.wait()
    kept = sum(image.id in done for image in images)
    return ExportResult(len(images) - kept - len(failures), kept, failures, levels, mark)


def describe_levels(extractor: FeatureExtractor, wanted: Sequence[int] | None = None) -> list[dict[str, Any]]:
    """Find name, index, stride and channels of the maps to write by running the extractor on an empty image.

    Raises:
        CommandError: If a wanted level does not exist.
    """
    channels = getattr(extractor.backbone, 'in_channels', 3)
    with torch.inference_mode():
        maps = extractor(torch.zeros(1, channels if isinstance(channels, int) else 3, _PROBE, _PROBE))
    for place in wanted or ():
        if not 0 <= place < len(maps):
            raise CommandError(f'levels {place}: the model gives {len(maps)} maps, 0 to {len(maps) - 1}.')
    if wanted is not None and len(set(wanted)) < len(wanted):
        raise CommandError(f'levels names a map twice: {" ".join(map(str, wanted))}.')
    for value in maps:
        if value.ndim != 4:
            raise CommandError(f'the model gives {tuple(value.shape)}, no map (B, C, H, W); set its out_type.')
    return [
        dict(name=f'level{place}', index=place, stride=_PROBE // maps[place].shape[2], channels=maps[place].shape[1])
        for place in (range(len(maps)) if wanted is None else wanted)
    ]


def _run(
    extractor: FeatureExtractor,
    dataset: _Images,
    store: FeatureStore,
    levels: Sequence[Mapping[str, Any]],
    options: ExportOptions,
    group: Processes,
    mark: str,
) -> list[dict[str, str]]:
    failures: list[dict[str, str]] = []

    def readable(samples: Iterable[_Sample]) -> Iterator[_Sample]:
        for sample in samples:
            if sample.data is None:
                image = sample.image
                failures.append(dict(id=image.id, path=image.path, reason=sample.reason))
                advance(1)
            else:
                yield sample

    workers = min(options.workers, len(dataset))
    loader = DataLoader(
        dataset,
        batch_size=None,
        num_workers=workers,
        # The next batch is read completely while one is computed.
        prefetch_factor=max(2, -(-2 * options.batch_size // workers)) if workers else None,
        pin_memory=group.device.type == 'cuda',
    )
    # One thread writes while the next batch is computed; it is the only one that touches the store.
    bar = progress('exporting', len(dataset), disable=group.rank != 0)
    with bar as advance, ThreadPoolExecutor(1) as writer, interrupt_on_sigterm():
        pending: list[Future] = []
        try:
            for batch in batches(readable(loader), options.batch_size):
                exported = _compute(extractor, batch, levels, options, group.device, mark)
                for future in pending:
                    future.result()
                pending = [writer.submit(_store, store, exported)]
                advance(len(batch))
        finally:
            # Computed maps are written even after an interruption.
            for future in pending:
                future.result()
            store.flush()
    return failures


@dataclass
class _Computed:
    """The maps (B, C, H, W) of a batch, possibly still being copied to the CPU, with the records of its images."""

    records: list[Record]
    maps: dict[str, Tensor]
    largest: Tensor | None
    arrived: torch.cuda.Event | None

    def images(self) -> Iterator[tuple[Record, dict[str, Tensor]]]:
        """Yield each image's record and maps (C, H, W), once they have arrived."""
        if self.arrived is not None:
            self.arrived.synchronize()
        if self.largest is not None and self.largest > torch.finfo(torch.float16).max:
            raise CommandError(
                f'features reach {self.largest.item():.3g}, beyond what float16 holds; use dtype bf16 or fp32.'
            )
        for place, record in enumerate(self.records):
            yield record, {name: value[place].contiguous() for name, value in self.maps.items()}


def _store(store: FeatureStore, computed: _Computed) -> None:
    for record, maps in computed.images():
        store.add(record, maps)


@torch.inference_mode()
def _compute(
    extractor: FeatureExtractor,
    batch: Sequence[_Sample],
    levels: Sequence[Mapping[str, Any]],
    options: ExportOptions,
    device: torch.device,
    mark: str,
) -> _Computed:
    data = [sample.data for sample in batch if sample.data is not None]
    # Work for a GPU is queued without synchronisation: pixels are copied as uint8, maps are copied back afterwards.
    inputs = [each['inputs'].to(device, non_blocking=True) for each in data]
    height, width = inputs[0].shape[1:]
    what = f'a batch of {len(data)} images of {width}x{height} pixels'
    with explain_lack_of_memory(what, 'lower batch_size, or max_pixels to leave the largest images out'):
        images = extractor.preprocess(dict(inputs=inputs, data_samples=[each['data_samples'] for each in data]))
        maps = extractor(images)
    dtype = DTYPES[options.dtype]
    chosen = {level['name']: maps[level['index']] for level in levels}
    moved = {name: value.to(dtype).to('cpu', non_blocking=True) for name, value in chosen.items()}
    largest = arrived = None
    if dtype == torch.float16:
        largest = torch.stack([_largest(value) for value in chosen.values()]).amax().to('cpu', non_blocking=True)
    if device.type == 'cuda':
        arrived = torch.cuda.Event()
        arrived.record(torch.cuda.current_stream(device))
    records: list[Record] = []
    for sample, each in zip(batch, data, strict=True):
        assert sample.placement is not None, 'what could be read has a place'
        meta = each['data_samples'].metainfo
        records.append(
            dict(
                id=sample.image.id,
                path=os.path.abspath(sample.image.path),
                original_size=list(meta['ori_shape'][:2]),
                input_size=list(each['inputs'].shape[1:]),
                padded_size=list(images.shape[2:]),
                **asdict(sample.placement),
                dtype=options.dtype,
                levels=[
                    dict(name=level['name'], stride=level['stride'], shape=list(moved[level['name']].shape[1:]))
                    for level in levels
                ],
                fingerprint=mark,
                **sample.image.extra,
            )
        )
    return _Computed(records, moved, largest, arrived)


def _largest(value: Tensor) -> Tensor:
    """Return the largest finite magnitude; infinities of the model itself are written unchanged."""
    return torch.where(torch.isfinite(value), value, torch.zeros_like(value)).abs().amax()


def _check_options(options: ExportOptions) -> None:
    if options.dtype not in DTYPES:
        raise CommandError(f'dtype is one of {", ".join(DTYPES)}, got {options.dtype!r}.')
    for name, least in (('shard_size', 0), ('batch_size', 1), ('workers', 0), ('max_pixels', 1)):
        value = getattr(options, name)
        if value < least:
            raise CommandError(f'{name} must be at least {least}, got {value}.')
    if os.path.isfile(options.out):
        raise CommandError(f'out {options.out} is a file; name a folder.')


def _check_same_images(out: str, images: Sequence[InputImage], done: Mapping[str, Record]) -> None:
    """Reject images whose id is that of another exported image: ids do not contain the folder."""
    for image in images:
        if image.id not in done:
            continue
        path, held = os.path.abspath(image.path), os.path.abspath(done[image.id]['path'])
        if path != held and os.path.realpath(path) != os.path.realpath(held):
            raise CommandError(
                f'out {out} holds features of another image with the id {image.id!r}: {held}, this one is '
                f'{path}. Name another folder.'
            )


def _draw_previews(options: ExportOptions, images: Sequence[InputImage], shows: bool) -> None:
    from ssm_backbones.features.preview import draw_missing_previews

    draw_missing_previews(options.out, {image.id for image in images}, quiet=not shows)
