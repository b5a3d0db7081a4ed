"""Exported backbones in onnxruntime and OpenVINO against PyTorch."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cuda_ops import runtimes
from ssm_backbones.benchmark.backbones import backbone_call, build_backbone
from ssm_backbones.benchmark.comparison import Comparison, Pair
from ssm_backbones.benchmark.timing import Call
from ssm_backbones.benchmark.unavailable import Unavailable
from ssm_backbones.utils.errors import CommandError

# The largest ratios to PyTorch's time aimed at, with the scans in standard operators and as operators of this package.
STANDARD = {'vmamba-tiny': 1.0, 'v2m-hier-small': 1.0, 'mamba2d-tiny': 1.0, 'v2m-tiny': 1.5}
CUSTOM = 1.05
# How the scans are written, as options of write_onnx.
FORMS: dict[str, tuple[dict[str, Any], str]] = {
    'loops': ({}, 'loops of standard operators'),
    'no-loops': ({'loops': False}, 'unrolled standard operators'),
    'custom': ({'custom_ops': True}, 'operators of this package'),
}


def exported_comparisons(name: str, size: int = 224) -> list[Comparison]:
    """Compare a backbone's exports with PyTorch on one image, a comparison for each of :data:`FORMS`.

    Args:
        name: Key of :data:`~ssm_backbones.benchmark.backbones.BACKBONES`.
        size: Side of the images.
    """
    comparisons = []
    for form, (_, scans) in FORMS.items():
        target = CUSTOM if form == 'custom' else STANDARD[name]
        entries = {
            'PyTorch': partial(backbone_call, name, 1, size, False),
            'onnxruntime': partial(_onnxruntime, name, size, form),
            'OpenVINO': partial(_openvino, name, size, form),
        }
        pairs = tuple(Pair(runtime, 'PyTorch', target) for runtime in ('onnxruntime', 'OpenVINO'))
        summary = f'forward at {size}x{size}, batch 1, scans as {scans}'
        comparisons.append(Comparison(f'exported/{name}/{form}', summary, entries, pairs, devices=('cpu',), images=1))
    return comparisons


@functools.lru_cache(maxsize=1)
def _exported(name: str, size: int, form: str) -> tuple[Path, tempfile.TemporaryDirectory[str]]:
    # Not at the top: the other benchmarks need neither mmengine nor onnx.
    from ssm_backbones.onnx_export.export import require_onnx, write_onnx

    try:
        require_onnx()
        if form == 'custom':
            runtimes.library('onnxruntime')
    except (CommandError, runtimes.BuildError) as error:
        raise Unavailable(str(error)) from error
    # Removed with the cache's entry.
    folder = tempfile.TemporaryDirectory(prefix='ssm-exported-')
    torch.manual_seed(0)
    path = Path(folder.name) / 'model.onnx'
    write_onnx(build_backbone(name, torch.device('cpu')), torch.randn(1, 3, size, size), path, **FORMS[form][0])
    return path, folder


def _onnxruntime(name: str, size: int, form: str, device: torch.device) -> Call:
    path = _exported(name, size, form)[0]
    from ssm_backbones.onnx_export.export import open_session

    session = open_session(path, form == 'custom')
    feed = {'images': torch.randn(1, 3, size, size).numpy()}
    return lambda: session.run(None, feed)


def _openvino(name: str, size: int, form: str, device: torch.device) -> Call:
    if importlib.util.find_spec('openvino') is None:
        raise Unavailable('openvino is not installed')
    core: Any = importlib.import_module('openvino').Core()
    if form == 'custom':
        try:
            core.add_extension(str(runtimes.library('openvino')))
        except runtimes.BuildError as error:
            raise Unavailable(str(error)) from error
    settings = {'INFERENCE_PRECISION_HINT': 'f32', 'INFERENCE_NUM_THREADS': torch.get_num_threads()}
    model = core.compile_model(core.read_model(_exported(name, size, form)[0]), 'CPU', settings)
    feed = {'images': torch.randn(1, 3, size, size).numpy()}
    return lambda: model(feed)
