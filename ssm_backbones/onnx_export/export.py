"""Export backbones, classifiers, segmentors and detectors to ONNX, for ``tools/export_onnx.py``."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import itertools
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from torch import Tensor, nn
from torch._dynamo.exc import UserError
from torch.fx.experimental.symbolic_shapes import ConstraintViolationError, GuardOnDataDependentSymNode
from torch.nn import functional as F
from torch.onnx import OnnxExporterError

from cuda_ops import runtimes
from ssm_backbones.apis.config import load_config
from ssm_backbones.apis.model import build_extractor, build_model, preprocessor_config
from ssm_backbones.onnx_export import decompositions as scans
from ssm_backbones.onnx_export import detections, pooling, precision
from ssm_backbones.onnx_export.detector import OUTPUTS, Detector, is_detector
from ssm_backbones.onnx_export.override import FunctionOverrideMode
from ssm_backbones.utils.errors import CommandError
from ssm_backbones.utils.files import atomic_file, writing
from ssm_backbones.utils.memory import explain_lack_of_memory
from ssm_backbones.utils.signals import interrupt_on_sigterm
from ssm_backbones.utils.torch_compat import release

PARTS = {'backbone': None, 'classifier': 'mmpretrain', 'segmentor': 'mmseg', 'detector': 'mmdet'}
_TIMED_RUNS = 5
# Raised by torch.export and torch.onnx for unsupported models.
_REFUSALS = (UserError, ConstraintViolationError, GuardOnDataDependentSymNode, OnnxExporterError, NotImplementedError)
# Example sizes for graphs with dynamic sizes. PyTorch specialises on coincidences of the example: a batch of 1, equal
# sides, or sides that a patch or a merging divides. These have none: stride 4 gives 17 and 33, halving gives 9 and 17,
# 5 and 9, 3 and 5.
_OPEN_BATCH, _OPEN_SIDES = 2, (67, 131)


@dataclass(frozen=True)
class OnnxOptions:
    """Options of ``tools/export_onnx.py``.

    Attributes:
        config: The config file.
        checkpoint: The model's checkpoint, or one of the backbone if that is the part; None exports the initial
            weights, to inspect the graph or its speed.
        shape: Height and width of the images.
        out: The file to write; the config's name with .onnx by default.
        part: ``'backbone'``, ``'classifier'``, ``'segmentor'`` or ``'detector'``; by default the config's model, or its
            backbone where :mod:`ssm_backbones.onnx_export.detector` does not take it.
        batch_size: Batch size of the graph.
        dynamic: Make batch, height and width dynamic.
        loops: Compute the scans by loops (``Scan``), rather than by unrolled operators, which take a fixed size.
        custom_ops: Keep each scan as one operator of this package, for runtimes that load the libraries of
            :mod:`cuda_ops.runtimes`.
        precision: One of :data:`~ssm_backbones.onnx_export.precision.PRECISIONS`. Inputs and outputs are float32 in any
            case. ``'int8'`` takes the ranges of activations from images of the config's training data,
            ``'int8-dynamic'`` at each run.
        calibration_images: Number of these images.
        keep_float: Patterns of names of layers that are not to be in 8-bit integers.
        cfg_options: Values that replace the config's, by dotted key.
    """

    config: str
    checkpoint: str | None = None
    shape: Sequence[int] = (224, 224)
    out: str | None = None
    part: str | None = None
    batch_size: int = 1
    dynamic: bool = False
    loops: bool = True
    custom_ops: bool = False
    precision: str = 'float32'
    calibration_images: int = 64
    keep_float: Sequence[str] = ()
    cfg_options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class OnnxResult:
    """Result of an export and of its comparison with PyTorch.

    Attributes:
        path: The file.
        part: The exported part of the model.
        opset: Version of ONNX's operators.
        nodes: Number of operators in the graph.
        inputs, outputs: Names of the graph's inputs and outputs.
        differences: For each tested shape of images (B, C, H, W), the largest difference of each output from
            PyTorch's, relative to the output's largest value; of a detector, the share of objects that have no
            counterpart.
        objects: Number of compared objects, of a detector.
        seconds: Best time of a run at the exported shape, by runtime ('onnxruntime', 'PyTorch').
        layers: Names of the layers in 8-bit integers and in float, where there are the former.
    """

    path: str
    part: str
    opset: int
    nodes: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    differences: dict[tuple[int, ...], dict[str, float]]
    seconds: dict[str, float]
    objects: int | None = None
    layers: precision.Layers | None = None


class Segmentor(nn.Module):
    """An mmseg segmentor from normalised images to class scores of their size, (B, classes, H, W).

    Each image is processed as a whole, even if the config's ``test_cfg`` uses a sliding window.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, images: Tensor) -> Tensor:
        scores = self.model.decode_head(self.model.extract_feat(images))
        return F.interpolate(scores, images.shape[2:], mode='bilinear', align_corners=self.model.align_corners)


class Classifier(nn.Module):
    """An mmpretrain classifier from normalised images to class scores before softmax, (B, classes)."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model.head(self.model.extract_feat(images))


def export_onnx(options: OnnxOptions) -> OnnxResult:
    """Export a model, run the file in onnxruntime and compare the outputs with PyTorch's.

    All backbones of this package can be exported, with mmpretrain's ``ImageClassifier``, mmseg's ``EncoderDecoder`` and
    mmdet's ``FasterRCNN``, ``MaskRCNN`` and ``RetinaNet`` around them. Of other detectors, and of segmentors with
    several successive decode heads (``CascadeEncoderDecoder``), only the backbones can be exported. With ``dynamic``,
    heads that compute with sizes in plain Python may be unsupported.

    Raises:
        CommandError: If the config, the checkpoint or the shape does not allow it, PyTorch cannot say the model in
            ONNX, or the file does not compute what PyTorch computes, within the bounds of
            :data:`~ssm_backbones.onnx_export.precision.PRECISIONS` or, for a detector in float32,
            :data:`~ssm_backbones.onnx_export.detections.TOLERANCE`; then it is not written.
    """
    require_onnx()
    _check_options(options)
    if options.custom_ops:
        _custom_ops_library()
    cfg = load_config(options.config, options.cfg_options)
    part = _part(cfg, options.part)
    height, width = options.shape
    path = Path(options.out or f'{Path(options.config).stem}_{part}.onnx')
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise CommandError(f'out {path}: {"it is a folder" if path.is_dir() else "its folder does not exist"}.')
    size = None if options.dynamic else (options.batch_size, height, width)
    calibration = precision.Calibration(cfg, part, options.calibration_images, size)
    if options.precision == 'int8':
        # Before the export, which takes longer than to find that there are none.
        next(iter(calibration))
    if options.precision.startswith('int8'):
        precision.require_quantization()
    with (
        interrupt_on_sigterm(),
        writing(path),
        atomic_file(path) as unfinished,
        tempfile.TemporaryDirectory() as folder,
    ):
        module, channels = _module(cfg, options.checkpoint, part)
        images = _example(module, (options.batch_size, channels, height, width))
        direct = options.precision in ('float32', 'float16')
        first = unfinished if direct else Path(folder) / 'model.onnx'
        written = precision.in_float16(module) if options.precision == 'float16' else module
        opset, nodes = _write(written, images, first, options, _notes(cfg, part, module))
        samples: list[Any] = [tuple(images.shape)]
        if options.dynamic:
            # Another batch size, and sides that no stride divides.
            samples += [(1, channels, height + 37, width + 11), (3, channels, width, height)]
        layers = None
        session = open_session(first, options.custom_ops)
        differences, objects = _compared(session, module, samples, options.precision if direct else 'float32')
        if not direct:
            if options.precision == 'bfloat16':
                precision.store_bfloat16(first, unfinished)
            else:
                ranges = calibration if options.precision == 'int8' else None
                opened = partial(open_session, custom_ops=options.custom_ops)
                layers = precision.quantize(first, unfinished, ranges, opened, options.keep_float)
                # Random images have other ranges.
                samples = samples if ranges is None else list(itertools.islice(ranges, 3))
            nodes = _count(importlib.import_module('onnx_ir').load(unfinished))
            session = open_session(unfinished, options.custom_ops)
            differences, objects = _compared(session, module, samples, options.precision)
        seconds = _times(session, module, images)
    names = tuple(each.name for each in session.get_inputs()), tuple(each.name for each in session.get_outputs())
    return OnnxResult(str(path), part, opset, nodes, *names, differences, seconds, objects, layers)


def write_onnx(
    module: nn.Module,
    images: Tensor,
    path: str | os.PathLike[str],
    dynamic: bool = False,
    notes: Mapping[str, str] | None = None,
    loops: bool = True,
    custom_ops: bool = False,
) -> tuple[int, int]:
    """Write a module as ONNX, with its scans as standard operators unless custom ones are asked for.

    Args:
        module: Module from images (B, C, H, W) to a tensor or a tuple of tensors, in evaluation mode.
        images: Example images, which set the graph's input shape, or with ``dynamic`` only its channels.
        path: The file.
        dynamic: Make batch, height and width dynamic.
        notes: Metadata of the file.
        loops: Compute the scans by loops (``Scan``), rather than by unrolled operators, which take a fixed size.
        custom_ops: Keep each scan as one operator (:mod:`ssm_backbones.onnx_export.custom_ops`).

    Returns:
        The opset's version and the number of operators.
    """
    from ssm_backbones.onnx_export import box_ops, repeated
    from ssm_backbones.onnx_export import custom_ops as custom_scans
    from ssm_backbones.onnx_export import scan_op as onnx_scans

    replaced = custom_scans.replacements() if custom_ops else scans.replacements(loops)
    translations = custom_scans.translations() if custom_ops else onnx_scans.translations()
    module = module.eval()
    if dynamic:
        images = torch.randn(_OPEN_BATCH, images.shape[1], *_OPEN_SIDES)
    open_dims = {place: torch.export.Dim.DYNAMIC for place in (0, 2, 3)} if dynamic else {}
    count = len(_as_tuple(_run(module, images)))

    def translate(module: nn.Module, inputs: tuple[Tensor, ...], dims: Mapping[int, Any], outputs: list[str]) -> Any:
        # Further inputs are one argument to PyTorch, a tuple.
        others: Any = (tuple({} for _ in inputs[1:]),) if len(inputs) > 1 else ()
        shapes = (dims, *others) if dims else None
        with FunctionOverrideMode({**replaced, **pooling.replacements()}):
            program = torch.export.export(module, inputs, dynamic_shapes=shapes, strict=False)
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=onnx_scans.OPSET,
            custom_translation_table={**translations, **repeated.translations(), **box_ops.translations()},
            input_names=['images'],
            output_names=outputs,
            verbose=False,
        )
        assert exported is not None, 'torch.onnx.export returns a program unless a file is given'
        onnx_scans.replace_placeholders(exported.model)
        return exported

    names = [f'map{place}' for place in range(count)] if count > 1 else ['output']
    if isinstance(module, Detector):
        names = list(OUTPUTS[:count])
    with torch.no_grad(), _quiet():
        kinds = repeated.repeated_blocks(module, images)
        with repeated.as_operators(kinds):
            exported = translate(module, (images,), open_dims, names)
        # Maps are (B, H, W, C) within a model.
        open_map = {place: torch.export.Dim.DYNAMIC for place in (0, 1, 2)} if dynamic else {}
        repeated.insert_blocks(
            exported.model, kinds, lambda block, inputs: translate(block, inputs, open_map, ['output']).model
        )
    exported.model.metadata_props.update(notes or {})
    exported.save(str(path))
    return onnx_scans.OPSET, _count(exported.model)


def open_session(path: str | os.PathLike[str], custom_ops: bool = False) -> Any:
    """Open an onnxruntime session of a file, on the CPU, with as many threads as PyTorch uses.

    Args:
        path: The file.
        custom_ops: Whether it has the scans as operators of this package.

    Raises:
        CommandError: If their library is not built, or onnxruntime does not take the file, as for an operator that it
            lacks.
    """
    runtime = importlib.import_module('onnxruntime')
    settings = runtime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    settings.log_severity_level = 3
    if custom_ops:
        settings.register_custom_ops_library(str(_custom_ops_library()))
    try:
        return runtime.InferenceSession(str(path), settings, providers=['CPUExecutionProvider'])
    except Exception as error:
        # onnxruntime's errors have no other common base class.
        said = str(error).strip().splitlines() or ['']
        raise CommandError(f'onnxruntime {runtime.__version__} does not take the file: {said[0]}') from error


def compare(session: Any, module: nn.Module, images: Sequence[int] | Tensor) -> dict[str, float]:
    """Return the differences between onnxruntime's and PyTorch's outputs, relative to the maxima.

    Args:
        session: onnxruntime's session of the file.
        module: The module.
        images: Images (B, C, H, W), or the shape of random ones.

    Raises:
        CommandError: If onnxruntime rejects the images, or its outputs have other shapes.
    """
    if not isinstance(images, Tensor):
        images = torch.randn(*images, generator=torch.Generator().manual_seed(1))
    shape = tuple(images.shape)
    try:
        found = session.run(None, {'images': images.numpy()})
    except Exception as error:
        # onnxruntime's errors have no other common base class.
        raise CommandError(f'onnxruntime fails for images {shape}: {str(error).strip()}') from error
    expected = _as_tuple(_run(module, images))
    names = [each.name for each in session.get_outputs()]
    differences = {}
    for name, ours, theirs in zip(names, expected, found, strict=True):
        if tuple(ours.shape) != theirs.shape:
            raise CommandError(f'{name} is {theirs.shape} in onnxruntime and {tuple(ours.shape)} in PyTorch.')
        reference = ours.double().numpy()
        differences[name] = float(np.abs(theirs - reference).max() / np.abs(reference).max())
    return differences


def require_onnx() -> None:
    """Refuse where torch is older than its exporter of open sizes, or the packages that exporting needs are missing.

    Raises:
        CommandError: If so. The message names the version or the packages.
    """
    if release() < (2, 6):
        raise CommandError(f'exporting to ONNX needs torch 2.6 or newer, and this is torch {torch.__version__}.')
    missing = [name for name in ('onnx', 'onnxscript', 'onnxruntime') if importlib.util.find_spec(name) is None]
    if missing:
        raise CommandError(f'{", ".join(missing)} not installed; pip install {" ".join(missing)}')


def _count(model: Any) -> int:
    return sum(1 for _ in model.graph.all_nodes())


def _part(cfg: Config, wanted: str | None) -> str:
    own = next((part for part, scope in PARTS.items() if scope == cfg.default_scope), 'backbone')
    if wanted is None:
        return 'backbone' if own == 'detector' and not is_detector(cfg.model) else own
    if wanted not in PARTS:
        raise CommandError(f'part is one of {", ".join(PARTS)}, got {wanted!r}.')
    if wanted not in (own, 'backbone'):
        raise CommandError(f'part {wanted}: the config is one of {cfg.default_scope}, which has no {wanted}.')
    return wanted


def _custom_ops_library() -> Path:
    try:
        return runtimes.library('onnxruntime')
    except runtimes.BuildError as error:
        raise CommandError(f'custom_ops: {error}') from error


def _check_options(options: OnnxOptions) -> None:
    if len(options.shape) != 2 or min(options.shape) < 1:
        raise CommandError(f'shape takes a height and a width of at least 1, got {tuple(options.shape)}.')
    if options.dynamic and not options.loops:
        raise CommandError(
            'dynamic needs loops: scans without them are unrolled for one size of images; export a file for each size, '
            'or name the largest one to ssm_backbones.export.decompositions().'
        )
    if options.custom_ops and not options.loops:
        raise CommandError('custom_ops and loops=False exclude each other: with custom operators no scan is unrolled.')
    if options.batch_size < 1:
        raise CommandError(f'batch_size must be at least 1, got {options.batch_size}.')
    if options.precision not in precision.PRECISIONS:
        raise CommandError(f'precision is one of {", ".join(precision.PRECISIONS)}, got {options.precision!r}.')
    if options.calibration_images < 1:
        raise CommandError(f'calibration_images must be at least 1, got {options.calibration_images}.')
    if options.keep_float and not options.precision.startswith('int8'):
        raise CommandError(f'keep_float goes with int8 and int8-dynamic, not with {options.precision}.')


def _module(cfg: Config, checkpoint: str | None, part: str) -> tuple[nn.Module, int]:
    module: nn.Module
    if part == 'backbone':
        module = build_extractor(cfg, checkpoint).backbone
        backbone = module
    elif part == 'detector':
        detector: Any = build_model(cfg, checkpoint).requires_grad_(False)
        module, backbone = Detector(detector), detector.backbone
    else:
        model: Any = build_model(cfg, checkpoint).requires_grad_(False)
        head = getattr(model, 'head' if part == 'classifier' else 'decode_head', None)
        if not isinstance(head, nn.Module) or isinstance(head, nn.ModuleList) or not hasattr(model, 'extract_feat'):
            raise CommandError(
                f'part {part}: the model of the config, a {cfg.model.type}, has not one head on its backbone; '
                'its backbone can be exported (part backbone).'
            )
        backbone = model.backbone
        module = Classifier(model) if part == 'classifier' else Segmentor(model)
    return module.eval(), getattr(backbone, 'in_channels', 3)


def _notes(cfg: Config, part: str, module: nn.Module) -> dict[str, str]:
    """Return the file's metadata: how to normalise images, or the sizes and classes of a detector."""
    if isinstance(module, Detector):
        return module.notes(cfg)
    settings = preprocessor_config(cfg)
    wanted = ('mean', 'std', 'bgr_to_rgb', 'to_rgb')
    return {'part': part, **{key: str(settings[key]) for key in wanted if key in settings}}


def _compared(
    session: Any, module: nn.Module, samples: Sequence[Any], numbers: str
) -> tuple[dict[tuple[int, ...], dict[str, float]], int | None]:
    """Compare outputs on images or random ones of a shape; return differences by shape, and the number of objects.

    Raises:
        CommandError: If they differ by more than the file's numbers explain.
    """
    differences: dict[tuple[int, ...], dict[str, float]] = {}
    objects = None
    for sample in samples:
        if isinstance(module, Detector):
            found = detections.compare(session, module, sample)
            objects = (objects or 0) + found.objects
            own = found.unmatched
        else:
            own = compare(session, module, sample)
        shape = tuple(sample.shape if isinstance(sample, Tensor) else sample)
        known = differences.get(shape, {})
        # Not max(), which passes over a NaN that is not the first.
        differences[shape] = {name: float(np.max([value, known.get(name, 0.0)])) for name, value in own.items()}
    bound = precision.PRECISIONS[numbers]
    if isinstance(module, Detector):
        # A rounding moves boxes and scores by more than what makes two objects the same one.
        bound = detections.TOLERANCE if numbers == 'float32' else 1.0
    _check_differences(differences, bound)
    return differences, objects


def _check_differences(
    differences: Mapping[tuple[int, ...], Mapping[str, float]], bound: float = precision.PRECISIONS['float32']
) -> None:
    for shape, outputs in differences.items():
        for name, value in outputs.items():
            # Written so that a NaN fails.
            if not value <= bound:
                raise CommandError(
                    f'onnxruntime and PyTorch differ by {value:.2e} in {name} for images {shape}, more than '
                    f'{bound:.0e}; nothing was written.'
                )


def _example(module: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """Return random images; refuse a model whose parts do not fit each other, or not the images."""
    try:
        with explain_lack_of_memory(f'the model with images {shape}', 'lower shape or batch_size'):
            images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
            _run(module, images)
            return images
    except CommandError:
        raise
    except (RuntimeError, ValueError, AssertionError, IndexError) as error:
        said = str(error).strip().splitlines() or ['']
        raise CommandError(
            f'the model does not take images {shape} ({type(error).__name__}: {said[0]}); compare '
            "in_channels of its neck and head with the backbone's widths, and the shape with what the model needs."
        ) from error


def _times(session: Any, module: nn.Module, images: Tensor) -> dict[str, float]:
    """Return the best times of a few runs, in interleaved rounds, so that both are measured under the same load."""
    feed = {'images': images.numpy()}
    best = {'onnxruntime': float('inf'), 'PyTorch': float('inf')}
    for _ in range(_TIMED_RUNS):
        for name, run in (('onnxruntime', lambda: session.run(None, feed)), ('PyTorch', lambda: _run(module, images))):
            began = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - began)
    return best


def _write(
    module: nn.Module, images: Tensor, path: Path, options: OnnxOptions, notes: Mapping[str, str]
) -> tuple[int, int]:
    """Call :func:`write_onnx`, and report models that PyTorch cannot export as a :class:`CommandError`."""
    try:
        return write_onnx(module, images, path, options.dynamic, notes, options.loops, options.custom_ops)
    except _REFUSALS as error:
        said = next((line.strip() for line in str(error).splitlines() if line.strip()), '')
        ways = [*(['without dynamic'] if options.dynamic else []), 'the backbone alone (part backbone)']
        raise CommandError(
            f'PyTorch cannot export this model to ONNX ({type(error).__name__}: {said}); try {", or ".join(ways)}.'
        ) from error


@torch.inference_mode()
def _run(module: nn.Module, images: Tensor) -> Any:
    return module(images)


def _as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's messages about PyTorch's internals; errors are raised as exceptions."""
    loggers = [logging.getLogger(name) for name in ('torch.onnx', 'torch.export', 'onnxscript', 'onnx_ir')]
    levels = [each.level for each in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter('ignore')
        for each in loggers:
            each.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for each, level in zip(loggers, levels, strict=True):
                each.setLevel(level)
