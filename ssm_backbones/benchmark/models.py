"""Whole models of mmpretrain, mmdet and mmseg configs: latency, throughput and peak memory against resolution.

What is timed is the libraries' own work on a prepared batch: ``model(..., mode='predict')`` with all that the model
does to its predictions, and for a training step ``mode='loss'``, the backward pass and the update by the config's own
optimizer. Images are noise with made-up annotations, weights are as initialised; reading and normalising images is
outside the clock.
"""

from __future__ import annotations

import gc
import logging
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmengine.registry import DefaultScope
from torch import Tensor, nn

from ssm_backbones.apis.config import load_config
from ssm_backbones.apis.model import build_model
from ssm_backbones.benchmark.annotations import let_detections_through, synthetic_batch
from ssm_backbones.benchmark.machine import describe_machine
from ssm_backbones.benchmark.memory import peak_bytes
from ssm_backbones.benchmark.report import Report
from ssm_backbones.benchmark.timing import Call, Clock, Settings, measure_interleaved, warm_up
from ssm_backbones.benchmark.unavailable import reason
from ssm_backbones.compat import let_mmcv_take_bfloat16
from ssm_backbones.utils.errors import CommandError

INFERENCE, TRAINING = 'inference', 'training step'


@dataclass(frozen=True)
class ModelOptions:
    """Models and settings of a measurement.

    Attributes:
        configs: Config files.
        against: Config files of the models that each of them is compared with.
        shapes: Heights and widths of the images.
        batch_size: Batch size.
        train: Also measure a training step.
        backbone: Measure only the backbone, without neck and heads; its training step has no update.
        amp: Compute in bfloat16 autocast.
        cfg_options: Values that replace those of every config, by dotted key.
    """

    configs: Sequence[str]
    shapes: Sequence[tuple[int, int]]
    against: Sequence[str] = ()
    batch_size: int = 1
    train: bool = False
    backbone: bool = False
    amp: bool = False
    cfg_options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.shapes:
            raise CommandError('--shape H W says how large the images are; give it once for each resolution.')
        for height, width in self.shapes:
            if min(height, width) < 1:
                raise CommandError(f'--shape takes at least 1 pixel each way, got {height} {width}')
        if self.batch_size < 1:
            raise CommandError(f'--batch-size must be at least 1, got {self.batch_size}')


class Subject:
    """A config's model, or its backbone, on a device.

    Args:
        path: The config file.
        options: See :class:`ModelOptions`.
        device: Where.

    Raises:
        CommandError: If the config cannot be read or its model cannot be built.
    """

    def __init__(self, path: str, options: ModelOptions, device: torch.device) -> None:
        self.path = path
        self.options = options
        self.device = device
        self.cfg = load_config(path, options.cfg_options)
        try:
            torch.manual_seed(0)
            with _quiet():
                self.model: Any = build_model(self.cfg).to(device)
        except Exception as error:
            # Registries and constructors raise arbitrary errors for an invalid config.
            raise CommandError(f'the model of {path} cannot be built: {reason(error)}') from error
        if options.backbone and not hasattr(self.model, 'backbone'):
            raise CommandError(f'--backbone: the model of {path}, a {type(self.model).__name__}, has none.')
        self._optimizer: OptimWrapper | None = None

    def prepare(self, height: int, width: int, train: bool) -> tuple[Call, dict[str, Any]]:
        """Return the call to measure and its record: the input size and the bytes held."""
        self.model.train(train)
        batch = synthetic_batch(self.cfg, self.model, self.options.batch_size, height, width, self.device)
        data = self._preprocess(batch, height, width, train)
        images = data['inputs']
        details: dict[str, Any] = dict(padded=list(images.shape[-2:]))
        if self.options.backbone:
            call = self._backbone_call(images, train)
        elif train:
            call = self._training_step(data)
        else:
            detections = let_detections_through(self.model, lambda: self._predict(data))
            if detections is not None:
                details['detections_per_image'] = detections
            call = lambda: self._predict(data)  # noqa: E731
        return call, details

    def held_bytes(self) -> int:
        """Return the bytes of the weights, buffers and the optimizer's state."""
        module = self.model.backbone if self.options.backbone else self.model
        state = self._optimizer.optimizer.state.values() if self._optimizer is not None else ()
        tensors = [*module.parameters(), *module.buffers(), *(value for each in state for value in each.values())]
        return sum(value.nbytes for value in tensors if isinstance(value, Tensor))

    def forget_training(self) -> None:
        """Drop gradients and the optimizer's state."""
        self._optimizer = None
        self.model.zero_grad(set_to_none=True)

    def _preprocess(self, batch: dict[str, Any], height: int, width: int, train: bool) -> dict[str, Any]:
        preprocessor = self.model.data_preprocessor
        if getattr(preprocessor, 'size', None) is not None:
            # mmseg's training pads smaller images to the crop's size; the requested size is measured instead.
            preprocessor.size = (height, width)
        return preprocessor(batch, train)

    def _autocast(self) -> Any:
        if self.options.amp and self.cfg.default_scope != 'mmpretrain':
            let_mmcv_take_bfloat16()
        return torch.autocast(self.device.type, torch.bfloat16) if self.options.amp else nullcontext()

    def _predict(self, data: Mapping[str, Any]) -> Any:
        with torch.inference_mode(), self._autocast():
            return self.model(**data, mode='predict')

    def _training_step(self, data: Mapping[str, Any]) -> Call:
        if self._optimizer is None:
            self._optimizer = _build_optimizer(self.cfg, self.model)
        optimizer, model = self._optimizer, self.model

        def step() -> None:
            with optimizer.optim_context(model), self._autocast():
                losses = model(**data, mode='loss')
            loss, _ = model.parse_losses(losses)
            optimizer.update_params(loss)

        return step

    def _backbone_call(self, images: Tensor, train: bool) -> Call:
        backbone = self.model.backbone

        def forward() -> None:
            with torch.inference_mode(), self._autocast():
                backbone(images)

        def forward_and_backward() -> None:
            with self._autocast():
                loss = torch.stack([each.float().mean() for each in _tensors(backbone(images))]).sum()
            loss.backward()
            backbone.zero_grad(set_to_none=True)

        return forward_and_backward if train else forward


def measure_models(
    options: ModelOptions,
    settings: Settings,
    progress: Callable[[str], None] = lambda line: None,
    save: Callable[[Report], None] = lambda report: None,
    seconds: float | None = None,
    clock: Clock = time.perf_counter,
) -> Report:
    """Measure every model at every resolution, the models of one resolution in interleaved rounds.

    Args:
        options: What to measure.
        settings: How to measure.
        progress: Called with the name of the next measurement.
        save: Called with the report after each resolution and pass.
        seconds: Time limit after which no measurement is started; the report names the remaining ones.
        clock: Seconds since some moment.

    Returns:
        A report with ``models`` (one record for each model, resolution and pass) and ``ratios`` (each model to each
        that it is compared with).

    Raises:
        CommandError: If a config cannot be used. A resolution that a model cannot take is listed under ``failed``.
    """
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    device = torch.device(settings.device)
    begin = time.monotonic()
    subjects = {name: Subject(path, options, device) for name, path in _names(options).items()}
    names = [*subjects]
    pairs = [(name, other) for name in names[: len(options.configs)] for other in names[len(options.configs) :]]
    report = Report(
        describe_machine(settings.device),
        dict(
            repeats=settings.repeats,
            device=settings.device,
            batch_size=options.batch_size,
            amp=options.amp,
            of='backbone' if options.backbone else 'model',
        ),
    )
    for training in (False, True) if options.train else (False,):
        what = TRAINING if training else INFERENCE
        for height, width in options.shapes:
            title = f'{what} at {height}x{width}'
            if seconds is not None and time.monotonic() - begin > seconds:
                report.skipped.append(dict(name=title, reason=f'{seconds:g} seconds were over'))
            else:
                progress(title)
                _measure(subjects, pairs, (height, width), training, settings, report, clock)
            save(report)
        for subject in subjects.values():
            subject.forget_training()
    return report


def _measure(
    subjects: Mapping[str, Subject],
    pairs: Sequence[tuple[str, str]],
    shape: tuple[int, int],
    train: bool,
    settings: Settings,
    report: Report,
    clock: Clock,
) -> None:
    device = torch.device(settings.device)
    what = TRAINING if train else INFERENCE
    calls: dict[str, Call] = {}
    loops: dict[str, int] = {}
    details: dict[str, dict[str, Any]] = {}
    failures: dict[str, str] = {}
    for name, subject in subjects.items():
        # A model that does not support this resolution, or runs out of memory, must not end the others' measurement.
        with _noting_failure(name, failures):
            call, details[name] = subject.prepare(*shape, train)
            loops[name] = warm_up(call, device, clock)
            calls[name] = call
    guarded = {name: _until_failure(name, call, failures) for name, call in calls.items()}
    records: dict[str, dict[str, Any]] = {}
    for name, times in measure_interleaved(guarded, settings.repeats, device, clock, loops).items():
        if name in failures:
            continue
        subject = subjects[name]
        latency = statistics.median(times)
        held = subject.held_bytes()
        with _noting_failure(name, failures):
            records[name] = dict(
                model=name,
                config=subject.path,
                what=what,
                height=shape[0],
                width=shape[1],
                batch_size=subject.options.batch_size,
                latency_s=latency,
                times_s=times,
                images_per_s=subject.options.batch_size / latency,
                peak_bytes=held + peak_bytes(calls[name], device),
                model_bytes=held,
                **details[name],
            )
    report.failed += [
        dict(name=f'{name}, {what} at {shape[0]}x{shape[1]}', reason=why) for name, why in failures.items()
    ]
    report.models += records.values()
    for name, other in pairs:
        if name in records and other in records:
            report.ratios.append(_ratio(records[name], records[other]))
    calls.clear()
    guarded.clear()
    gc.collect()
    if device.type == 'cuda':
        torch.cuda.empty_cache()


@contextmanager
def _noting_failure(name: str, failures: dict[str, str]) -> Iterator[None]:
    """Record an error as a line; keeping the error itself would keep the failed call's tensors."""
    try:
        yield
    except Exception as error:
        failures[name] = reason(error)


def _until_failure(name: str, call: Call, failures: dict[str, str]) -> Call:
    """Wrap a call for interleaved rounds: after a failure it does nothing, and its times are invalid."""

    def run() -> None:
        if name not in failures:
            with _noting_failure(name, failures):
                call()

    return run


def _ratio(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    return dict(
        model=ours['model'],
        against=theirs['model'],
        **{key: ours[key] for key in ('what', 'height', 'width')},
        time_ratio=statistics.median(a / b for a, b in zip(ours['times_s'], theirs['times_s'], strict=True)),
        memory_ratio=ours['peak_bytes'] / theirs['peak_bytes'],
    )


def _names(options: ModelOptions) -> dict[str, str]:
    """Return the configs' paths by model name: file names, or whole paths if two are equal."""
    paths = [*options.configs, *options.against]
    twice = [path for path, count in Counter(paths).items() if count > 1]
    if twice:
        raise CommandError(f'the config {twice[0]} is named twice.')
    stems = Counter(Path(path).stem for path in paths)
    return {path if stems[Path(path).stem] > 1 else Path(path).stem: path for path in paths}


def _build_optimizer(cfg: Config, model: nn.Module) -> OptimWrapper:
    """Build the config's optimizer with its groups and clipping, in full precision; autocast is set separately."""
    settings = dict(cfg.get('optim_wrapper') or dict(optimizer=dict(type='AdamW', lr=0.0)))
    for key in ('loss_scale', 'dtype', 'use_fsdp', 'accumulative_counts'):
        settings.pop(key, None)
    settings['type'] = 'OptimWrapper'
    with _quiet(), DefaultScope.overwrite_default_scope(cfg.default_scope):
        wrapper = build_optim_wrapper(model, settings)
    # Many steps on noise would spoil the weights. An update by 0 takes as long.
    for group in wrapper.optimizer.param_groups:
        group['lr'] = 0.0
    return wrapper


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence mmengine's lines about every parameter's settings, which would be printed with the table."""
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


def _tensors(maps: Any) -> Iterator[Tensor]:
    if isinstance(maps, Tensor):
        yield maps
    else:
        for each in maps:
            yield from _tensors(each)
