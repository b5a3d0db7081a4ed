"""Run every family and task in every runtime that has a wheel, and write a table of what agrees: `make deploy`.

Models are tiny ones with random weights; a row says how far a runtime's outputs are from PyTorch's, relative to the
largest value, or what stopped it. Each runtime has a process of its own, since several bring their own protobuf or
LLVM, and goes on in another one where it crashes. The status is 1 where a runtime computes something else than PyTorch:
what stops is told by its own error.
"""

import argparse
import contextlib
import importlib
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
# Its converter needs another typing-extensions than the other packages' pins.
PYTHONS = {'LiteRT': ROOT / '.venv-litert' / 'bin' / 'python'}
SIZE = (48, 64)
TOLERANCE = 1e-4
TIMEOUT = 1200

FAMILIES: dict[str, dict[str, Any]] = {
    'VMamba': dict(
        type='VMamba', arch=dict(embed_dims=16, depths=[1, 1], d_state=1, ssm_ratio=1.0, version='v2'), widths=[16, 32]
    ),
    'V2M, hierarchical': dict(
        type='V2M',
        arch=dict(layout='hierarchical', embed_dims=16, depths=[1, 1], d_state=2, ssm_ratio=1.0),
        widths=[16, 32],
    ),
    'V2M, plain': dict(
        type='V2M',
        arch=dict(layout='plain', embed_dims=16, depth=1, d_state=2),
        img_size=SIZE[0],
        widths=[4, 8, 16, 16],
    ),
    'Mamba2D': dict(
        type='Mamba2D',
        arch=dict(embed_dims=[16, 32], depths=[1, 1], d_state=2, mixers=['scan', 'attention']),
        widths=[16, 32],
    ),
}
TASKS = ('classification', 'segmentation', 'detection')
Outputs = Sequence[np.ndarray]


class Pyramid(nn.Module):
    """The backbone of a detector and its FPN."""

    def __init__(self, backbone: nn.Module, neck: nn.Module) -> None:
        super().__init__()
        self.backbone, self.neck = backbone, neck

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.neck(self.backbone(images)))


def build(family: str, task: str) -> nn.Module:
    """Build a tiny model from images (B, 3, H, W) to scores, or to the maps of an FPN."""
    from mmengine.config import Config

    from ssm_backbones.apis.model import build_model
    from ssm_backbones.onnx_export.export import Classifier, Segmentor

    settings = dict(FAMILIES[family])
    widths = settings.pop('widths')
    # A plain backbone has one map, of which its pyramid makes those of the other strides.
    is_plain = settings['arch'].get('layout') == 'plain'
    places: dict[str, Any] = dict(pyramid='single') if is_plain else dict(out_indices=list(range(len(widths))))
    torch.manual_seed(0)
    if task == 'detection':
        from mmdet.models.necks import FPN
        from mmengine.registry import MODELS

        backbone = MODELS.build({**settings, **places})
        return Pyramid(backbone, FPN(widths, out_channels=8, num_outs=len(widths) + 1)).eval()
    if task == 'classification':
        if not is_plain:
            places = dict(out_indices=(len(widths) - 1,))
        head = dict(type='LinearClsHead', num_classes=5, in_channels=widths[-1])
        model = dict(type='ImageClassifier', backbone={**settings, **places}, neck=dict(type='GlobalAveragePooling'))
        return Classifier(build_model(Config(dict(default_scope='mmpretrain', model=dict(**model, head=head))))).eval()
    head = dict(
        type='UPerHead', in_channels=widths, in_index=list(range(len(widths))), pool_scales=(1, 2, 3, 6), channels=8,
        num_classes=5, norm_cfg=dict(type='BN'), align_corners=False,
    )  # fmt: skip
    backbone = {**settings, **places}
    model = dict(type='EncoderDecoder', backbone=backbone, decode_head=head, train_cfg={}, test_cfg=dict(mode='whole'))
    return Segmentor(build_model(Config(dict(default_scope='mmseg', model=model)))).eval()


def to_onnx(module: nn.Module, images: Tensor, folder: Path, loops: bool = True) -> Path:
    from ssm_backbones.onnx_export.export import write_onnx

    write_onnx(module, images, folder / 'model.onnx', loops=loops)
    return folder / 'model.onnx'


def to_program(module: nn.Module, images: Tensor) -> Any:
    """Export a program of PyTorch's own operators alone."""
    from ssm_backbones.export import decompositions

    program = torch.export.export(module, (images,), strict=False)
    return program.run_decompositions({**torch.export.default_decompositions(), **decompositions()})


class Portable(nn.Module):
    """A module whose scans run as PyTorch's own operators, for converters that trace it themselves."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, images: Tensor) -> Any:
        from ssm_backbones.onnx_export import decompositions, pooling
        from ssm_backbones.onnx_export.override import FunctionOverrideMode

        with FunctionOverrideMode({**decompositions.replacements(loops=False), **pooling.replacements()}):
            return self.module(images)


def run_onnxruntime(module: nn.Module, images: Tensor, folder: Path, loops: bool = True) -> Outputs:
    import onnxruntime

    session = onnxruntime.InferenceSession(to_onnx(module, images, folder, loops), providers=['CPUExecutionProvider'])
    return session.run(None, {'images': images.numpy()})


def run_openvino(module: nn.Module, images: Tensor, folder: Path, source: str) -> Outputs:
    import openvino

    core = openvino.Core()
    if source == 'torch.export':
        model = openvino.convert_model(to_program(module, images))
    else:
        model = core.read_model(to_onnx(module, images, folder, loops=source == 'ONNX'))
    return list(core.compile_model(model, 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})([images.numpy()]).values())


def run_executorch(module: nn.Module, images: Tensor, folder: Path) -> Outputs:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime

    lowered = to_edge_transform_and_lower(to_program(module, images), partitioner=[XnnpackPartitioner()])
    (folder / 'model.pte').write_bytes(lowered.to_executorch().buffer)
    method = Runtime.get().load_program(folder / 'model.pte').load_method('forward')
    return [output.numpy() for output in method.execute([images])]


def run_litert(module: nn.Module, images: Tensor, folder: Path) -> Outputs:
    import litert_torch

    outputs = litert_torch.convert(to_program(module, images).module(), (images,))(images)
    return list(outputs) if isinstance(outputs, (list, tuple)) else [outputs]


def run_coremltools(module: nn.Module, images: Tensor, folder: Path) -> None:
    import coremltools

    model = coremltools.convert(to_program(module, images), minimum_deployment_target=coremltools.target.iOS17)
    model.save(str(folder / 'model.mlpackage'))


def run_ncnn(module: nn.Module, images: Tensor, folder: Path) -> Outputs:
    import ncnn
    import pnnx

    traced = torch.jit.trace(Portable(module), images, check_trace=False).eval()
    # pnnx 20261020 crashes at modules whose weights are used without a call of their own; freezing leaves no modules.
    torch.jit.freeze(traced).save(str(folder / 'model.pt'))
    pnnx.convert(str(folder / 'model.pt'), images, fp16=False)
    net = ncnn.Net()
    net.load_param(str(folder / 'model.ncnn.param'))
    net.load_model(str(folder / 'model.ncnn.bin'))
    with net.create_extractor() as extractor:
        extractor.input('in0', ncnn.Mat(images[0].numpy()).clone())
        return [np.array(extractor.extract(name)[1])[None] for name in net.output_names()]


def run_mnn(module: nn.Module, images: Tensor, folder: Path) -> Outputs:
    import MNN

    path = to_onnx(module, images, folder, loops=False)
    command = [sys.executable, '-m', 'MNN.tools.mnnconvert', '-f', 'ONNX', '--modelFile', str(path)]
    command += ['--MNNModel', str(folder / 'model.mnn'), '--bizCode', 'MNN']
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if not (folder / 'model.mnn').exists():
        raise RuntimeError((done.stdout + done.stderr).strip().splitlines()[-1])
    import onnx

    names = [each.name for each in onnx.load(path).graph.output]
    net = MNN.nn.load_module_from_file(str(folder / 'model.mnn'), ['images'], names)
    given = MNN.expr.convert(MNN.expr.const(images.numpy(), list(images.shape)), MNN.expr.NC4HW4)
    return [np.array(MNN.expr.convert(each, MNN.expr.NCHW).read()) for each in net.onForward([given])]


def run_tvm(module: nn.Module, images: Tensor, folder: Path) -> Outputs:
    import tvm
    from tvm import relax
    from tvm.relax.frontend.torch import from_exported_program

    machine = relax.VirtualMachine(tvm.compile(from_exported_program(to_program(module, images)), 'llvm'), tvm.cpu())
    found = machine['main'](tvm.runtime.tensor(images.numpy()))
    return [each.numpy() for each in found]


RUNTIMES: dict[str, Callable[[nn.Module, Tensor, Path], Outputs | None]] = {
    'onnxruntime, ONNX': run_onnxruntime,
    'onnxruntime, ONNX without loops': lambda *given: run_onnxruntime(*given, loops=False),
    'OpenVINO, ONNX': lambda *given: run_openvino(*given, source='ONNX'),
    'OpenVINO, ONNX without loops': lambda *given: run_openvino(*given, source='ONNX without loops'),
    'OpenVINO, torch.export': lambda *given: run_openvino(*given, source='torch.export'),
    'ExecuTorch, XNNPACK': run_executorch,
    'LiteRT, litert-torch': run_litert,
    'Core ML, coremltools': run_coremltools,
    'ncnn, pnnx': run_ncnn,
    'MNN, ONNX without loops': run_mnn,
    'TVM, torch.export': run_tvm,
}


# Whose release the table names, where it is not the runtime's name in small letters.
PACKAGES = {'Core ML': 'coremltools', 'TVM': 'apache-tvm', 'LiteRT': 'litert-torch'}


def with_version(runtime: str) -> str:
    """Name a runtime with its release."""
    name, _, way = runtime.partition(', ')
    code = f"import importlib.metadata as m; print(m.version('{PACKAGES.get(name, name.lower())}'))"
    found = subprocess.run([python_of(runtime), '-c', code], capture_output=True, text=True, check=False)
    return f'{name} {found.stdout.strip()}, {way}' if found.returncode == 0 else runtime


def check(runtime: str, family: str, task: str) -> dict[str, Any]:
    """Compare a runtime's outputs with PyTorch's: the largest difference, or the error that stopped it."""
    module, images = build(family, task), torch.randn(1, 3, *SIZE)
    with torch.no_grad():
        expected = module(images)
    expected = (expected,) if isinstance(expected, Tensor) else expected
    try:
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            found = RUNTIMES[runtime](module, images, Path(folder))
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return dict(error=f'{type(error).__name__}: {lines[0] if lines else ""}'[:300])
    if found is None:
        return dict(converted=True)
    if len(found) != len(expected):
        return dict(error=f'{len(found)} outputs instead of {len(expected)}')
    differences = []
    for ours, theirs in zip(expected, found, strict=True):
        if tuple(ours.shape) != tuple(theirs.shape):
            return dict(error=f'an output has the shape {tuple(theirs.shape)} instead of {tuple(ours.shape)}')
        differences.append(float(np.abs(ours.numpy() - theirs).max() / ours.abs().max()))
    # max() would pass over a NaN that is not the first.
    return dict(difference=float(np.max(differences)))


def child(runtime: str, places: Sequence[tuple[str, str]]) -> None:
    """Check families and tasks in this process, and print a line for each."""
    importlib.import_module('ssm_backbones')
    out = os.fdopen(os.dup(1), 'w')
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for family, task in places:
            print('RESULT', json.dumps([family, task, check(runtime, family, task)]), file=out, flush=True)


def python_of(runtime: str) -> str:
    """Return the Python whose environment has a runtime."""
    return str(PYTHONS.get(runtime.partition(', ')[0], sys.executable))


def results(runtime: str, places: Sequence[tuple[str, str]]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Check families and tasks in a process of their own, and the rest in another one where it crashes or hangs."""
    environment = {**os.environ, 'PYTHONPATH': os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))}
    waiting = list(places)
    while waiting:
        command = [python_of(runtime), __file__, '--runtimes', runtime, '--child', json.dumps(waiting)]
        with tempfile.TemporaryFile('w+', errors='replace') as errors:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
            assert process.stdout is not None
            hangs = threading.Event()
            for line in lines_of(process, hangs):
                if line.startswith('RESULT '):
                    family, task, found = json.loads(line.partition(' ')[2])
                    waiting.remove((family, task))
                    yield family, task, found
            status = process.wait()
            errors.seek(0)
            said = errors.read().strip()[-200:]
        if waiting:
            reason = f'it is not done within {TIMEOUT} s' if hangs.is_set() else end(status, said)
            yield (*waiting.pop(0), dict(error=reason))


def lines_of(process: subprocess.Popen[str], hangs: threading.Event) -> Iterator[str]:
    """Yield a process's lines; end it, and say so, where it is silent for :data:`TIMEOUT` seconds."""

    def stop() -> None:
        hangs.set()
        process.kill()

    assert process.stdout is not None
    while True:
        timer = threading.Timer(TIMEOUT, stop)
        timer.start()
        line = process.stdout.readline()
        timer.cancel()
        if not line:
            return
        yield line


def end(status: int, said: str) -> str:
    """Say how a process ended that gave no result."""
    if status < 0:
        return f'the process crashes ({signal.Signals(-status).name})'
    return f'the process ends with {status}: {said or "it says nothing"}'


def words(result: dict[str, Any]) -> str:
    """Say a result in a table's cell."""
    if 'error' in result:
        return 'not, because ' + ' '.join(result['error'].replace('|', '/').split())
    if 'converted' in result:
        return 'converts (runs on a Mac alone)'
    value = result['difference']
    return f'works, agrees to {value:.0e}' if value <= TOLERANCE else f'**computes something else: {value:.0e} off**'


def main() -> int:
    """Check what is asked for, write the table, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    for option, known in (('--runtimes', RUNTIMES), ('--families', FAMILIES)):
        names = ', '.join(map(repr, known))
        parser.add_argument(option, nargs='+', default=list(known), metavar='NAME', help=names)
    parser.add_argument('--tasks', nargs='+', default=list(TASKS), choices=TASKS)
    parser.add_argument('--out', type=Path, default=ROOT / 'build' / 'deploy.md')
    parser.add_argument('--child', type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    for option, known in (('runtimes', RUNTIMES), ('families', FAMILIES)):
        unknown = [name for name in getattr(args, option) if name not in known]
        if unknown:
            parser.error(f'--{option}: {", ".join(map(repr, unknown))} is none of {", ".join(map(repr, known))}')
    if args.child:
        child(args.runtimes[0], args.child)
        return 0
    missing = [python for name in args.runtimes if not Path(python := python_of(name)).exists()]
    if missing:
        parser.error(f'{missing[0]} is missing; make deploy makes it')
    lines = [f'| runtime | family | {" | ".join(args.tasks)} |', '| --- ' * (2 + len(args.tasks)) + '|']
    wrong = False
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for runtime in args.runtimes:
        found: dict[str, dict[str, str]] = {}
        for family, task, result in results(
            runtime, [(family, task) for family in args.families for task in args.tasks]
        ):
            wrong |= not result.get('difference', 0.0) <= TOLERANCE
            found.setdefault(family, {})[task] = words(result)
            if len(found[family]) == len(args.tasks):
                cells = ' | '.join(found[family][task] for task in args.tasks)
                lines.append(f'| {with_version(runtime)} | {family} | {cells} |')
                print(lines[-1], flush=True)
                args.out.write_text('\n'.join(lines) + '\n')
    print(f'table: {args.out}')
    return int(wrong)


if __name__ == '__main__':
    sys.exit(main())
