"""Export to ONNX: backbone, classifier or segmentor, in standard operators, checked against PyTorch.

What ``tools/export_onnx.py`` does.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import logging
import os
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
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

from ssm_backbones.apis.config import load_config
from ssm_backbones.apis.model import build_extractor, build_model, preprocessor_config
from ssm_backbones.onnx_export import decompositions as scans
from ssm_backbones.onnx_export import pooling
from ssm_backbones.onnx_export.override import FunctionOverrideMode
from ssm_backbones.utils.errors import CommandError
from ssm_backbones.utils.files import atomic_file, writing
from ssm_backbones.utils.signals import interrupt_on_sigterm
from ssm_backbones.utils.torch_compat import release

TOLERANCE = 1e-4
PARTS = {'backbone': None, 'classifier': 'mmpretrain', 'segmentor': 'mmseg'}
_TIMED_RUNS = 5
# What torch.export and torch.onnx raise for models that they have no graph for.
_REFUSALS = (UserError, ConstraintViolationError, GuardOnDataDependentSymNode, OnnxExporterError, NotImplementedError)
# What a graph of open sizes is traced with. PyTorch settles for the whole program what holds of an example by chance:
# that the batch is one, that sides are equal, or that a patch or a merging divides them. Here nothing does: a stride
# of 4 makes 17 and 33 of these sides, and halving that 9 and 17, 5 and 9, 3 and 5.
_OPEN_BATCH, _OPEN_SIDES = 2, (67, 131)


@dataclass(frozen=True)
class OnnxOptions:
    """What ``tools/export_onnx.py`` is told.

    Attributes:
        config: The config file.
        checkpoint: The model's checkpoint, or of a backbone alone where that is the part; None exports the weights as
            they are initialised, for a look at the graph or the speed.
        shape: Height and width of the images.
        out: The file to write; the config's name with .onnx by default.
        part: ``'backbone'``, ``'classifier'`` or ``'segmentor'``; by default what the config is of, and of a detector
            the backbone.
        batch_size: Images that the graph takes at once.
        dynamic: Leave batch, height and width open.
        cfg_options: Values that replace the config's, by dotted key.
    """

    config: str
    checkpoint: str | None = None
    shape: Sequence[int] = (224, 224)
    out: str | None = None
    part: str | None = None
    batch_size: int = 1
    dynamic: bool = False
    cfg_options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class OnnxResult:
    """What was exported and how it compares.

    Attributes:
        path: The file.
        part: What it is of.
        opset: Version of ONNX's operators.
        nodes: Operators in the graph.
        inputs, outputs: Names.
        differences: For each shape of images (B, C, H, W) that was tried, the largest difference of each output from
            PyTorch's, relative to the output's largest value.
        seconds: Best time of a run at the exported shape, by runtime ('onnxruntime', 'PyTorch').
    """

    path: str
    part: str
    opset: int
    nodes: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    differences: dict[tuple[int, ...], dict[str, float]]
    seconds: dict[str, float]


class Segmentor(nn.Module):
    """An mmseg segmentor from normalised images to class scores of their size, (B, classes, H, W).

    Each image goes through as a whole, also where the config's ``test_cfg`` slides a window over it.
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
    """Export as the options say, run the file in onnxruntime, and compare it with PyTorch.

    All backbones of this package can be exported, with mmpretrain's ``ImageClassifier`` and mmseg's ``EncoderDecoder``
    around them. Segmentors of several decoding heads in a row (``CascadeEncoderDecoder``) and detectors cannot be as a
    whole; their backbones can. With ``dynamic``, a head that computes with the sizes in plain Python may be refused.

    Raises:
        CommandError: If the config, the checkpoint or the shape does not allow it, PyTorch cannot say the model in
            ONNX, or the file does not compute what PyTorch computes, within :data:`TOLERANCE`; then it is not written.
    """
    require_onnx()
    cfg = load_config(options.config, options.cfg_options)
    part = _part(cfg, options.part)
    height, width = _check_shape(options)
    path = Path(options.out or f'{Path(options.config).stem}_{part}.onnx')
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise CommandError(f'--out {path}: {"it is a folder" if path.is_dir() else "its folder does not exist"}.')
    with interrupt_on_sigterm(), writing(path), atomic_file(path) as partial:
        module, channels = _module(cfg, options.checkpoint, part)
        images = torch.randn(options.batch_size, channels, height, width, generator=torch.Generator().manual_seed(0))
        opset, nodes = _write(module, images, partial, options, _notes(cfg, part))
        shapes = [tuple(images.shape)]
        if options.dynamic:
            # Another batch, and sides that no stride divides.
            shapes += [(1, channels, height + 37, width + 11), (3, channels, width, height)]
        session = open_session(partial)
        differences = {shape: compare(session, module, shape) for shape in shapes}
        _check_differences(differences)
        seconds = _times(session, module, images)
    names = tuple(each.name for each in session.get_inputs()), tuple(each.name for each in session.get_outputs())
    return OnnxResult(str(path), part, opset, nodes, *names, differences, seconds)


def write_onnx(
    module: nn.Module,
    images: Tensor,
    path: str | os.PathLike[str],
    dynamic: bool = False,
    notes: Mapping[str, str] | None = None,
) -> tuple[int, int]:
    """Write a module that takes images as ONNX, its scans as standard operators.

    Args:
        module: From images (B, C, H, W) to a tensor or a tuple of tensors; in evaluation mode.
        images: An example: what the graph takes has its shape, or with ``dynamic`` its channels alone.
        path: The file.
        dynamic: Leave batch, height and width open.
        notes: Metadata of the file.

    Returns:
        The opset's version and the number of operators.
    """
    from ssm_backbones.onnx_export import scan_op as onnx_scans

    module = module.eval()
    shapes = None
    if dynamic:
        images = torch.randn(_OPEN_BATCH, images.shape[1], *_OPEN_SIDES)
        shapes = ({0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC},)
    count = len(_as_tuple(_run(module, images)))
    with torch.no_grad(), _quiet():
        with FunctionOverrideMode({**scans.replacements(), **pooling.replacements()}):
            program = torch.export.export(module, (images,), dynamic_shapes=shapes, strict=False)
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=onnx_scans.OPSET,
            custom_translation_table=onnx_scans.translations(),
            input_names=['images'],
            output_names=[f'map{place}' for place in range(count)] if count > 1 else ['output'],
            verbose=False,
        )
    assert exported is not None, 'torch.onnx.export returns a program where it is not told a file'
    onnx_scans.replace_placeholders(exported.model)
    exported.model.metadata_props.update(notes or {})
    exported.save(str(path))
    return onnx_scans.OPSET, sum(1 for _ in exported.model.graph.all_nodes())


def open_session(path: str | os.PathLike[str]) -> Any:
    """onnxruntime's session of a file, on the CPU, with as many threads as PyTorch has."""
    runtime = importlib.import_module('onnxruntime')
    settings = runtime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    settings.log_severity_level = 3
    return runtime.InferenceSession(str(path), settings, providers=['CPUExecutionProvider'])


def compare(session: Any, module: nn.Module, shape: Sequence[int]) -> dict[str, float]:
    """How far onnxruntime's outputs are from PyTorch's on random images, relative to their largest value.

    Raises:
        CommandError: If onnxruntime does not take the images, or gives outputs of other shapes.
    """
    images = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    try:
        found = session.run(None, {'images': images.numpy()})
    except Exception as error:
        # Its errors have no class in common but this one.
        raise CommandError(f'onnxruntime fails for images {tuple(shape)}: {str(error).strip()}') from error
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
        CommandError: Naming them.
    """
    if release() < (2, 6):
        raise CommandError(f'exporting to ONNX needs torch 2.6 or newer, and this is torch {torch.__version__}.')
    missing = [name for name in ('onnx', 'onnxscript', 'onnxruntime') if importlib.util.find_spec(name) is None]
    if missing:
        raise CommandError(f'{", ".join(missing)} not installed; pip install {" ".join(missing)}')


def _part(cfg: Config, wanted: str | None) -> str:
    own = next((part for part, scope in PARTS.items() if scope == cfg.default_scope), 'backbone')
    if wanted is None:
        return own
    if wanted not in PARTS:
        raise CommandError(f'--part is one of {", ".join(PARTS)}, got {wanted!r}.')
    if wanted not in (own, 'backbone'):
        raise CommandError(f'--part {wanted}: the config is one of {cfg.default_scope}, which has no {wanted}.')
    return wanted


def _check_shape(options: OnnxOptions) -> tuple[int, int]:
    if len(options.shape) != 2 or min(options.shape) < 1:
        raise CommandError(f'--shape takes a height and a width of at least 1, got {tuple(options.shape)}.')
    if options.batch_size < 1:
        raise CommandError(f'--batch-size must be at least 1, got {options.batch_size}.')
    return options.shape[0], options.shape[1]


def _module(cfg: Config, checkpoint: str | None, part: str) -> tuple[nn.Module, int]:
    module: nn.Module
    if part == 'backbone':
        module = build_extractor(cfg, checkpoint).backbone
        backbone = module
    else:
        model: Any = build_model(cfg, checkpoint).requires_grad_(False)
        head = getattr(model, 'head' if part == 'classifier' else 'decode_head', None)
        if not isinstance(head, nn.Module) or isinstance(head, nn.ModuleList) or not hasattr(model, 'extract_feat'):
            raise CommandError(
                f'--part {part}: the model of the config, a {cfg.model.type}, has not one head on its backbone; '
                'its backbone can be exported (--part backbone).'
            )
        backbone = model.backbone
        module = Classifier(model) if part == 'classifier' else Segmentor(model)
    return module.eval(), getattr(backbone, 'in_channels', 3)


def _notes(cfg: Config, part: str) -> dict[str, str]:
    """What a user of the file has to know: how images are normalised."""
    settings = preprocessor_config(cfg)
    wanted = ('mean', 'std', 'bgr_to_rgb', 'to_rgb')
    return {'part': part, **{key: str(settings[key]) for key in wanted if key in settings}}


def _check_differences(differences: Mapping[tuple[int, ...], Mapping[str, float]]) -> None:
    for shape, outputs in differences.items():
        for name, value in outputs.items():
            # Written so that a NaN fails.
            if not value <= TOLERANCE:
                raise CommandError(
                    f'onnxruntime and PyTorch differ by {value:.2e} in {name} for images {shape}, more than '
                    f'{TOLERANCE:.0e}; nothing was written.'
                )


def _times(session: Any, module: nn.Module, images: Tensor) -> dict[str, float]:
    """The best of a few runs; they take turns, so that both meet the same machine."""
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
    """:func:`write_onnx`, and what PyTorch cannot export told in a line."""
    try:
        return write_onnx(module, images, path, options.dynamic, notes)
    except _REFUSALS as error:
        said = next((line.strip() for line in str(error).splitlines() if line.strip()), '')
        ways = [*(['without --dynamic'] if options.dynamic else []), 'the backbone alone (--part backbone)']
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
    """Without the exporter's notes on PyTorch's own internals, which it also prints; errors come as exceptions."""
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
