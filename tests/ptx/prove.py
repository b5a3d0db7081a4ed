"""Give the kernels' PTX to sentryward, a verifier that proves threads to be ordered, whatever the schedule.

Launches are those that small calls of the operators make.
"""

import concurrent.futures
import ctypes
import dataclasses
import functools
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import cuda_ops
from tests.cuda_emulation.emulate import CSRC
from tests.ptx.interpret import Interpreter, compile_ptx, kernel_report

ARCHS = ('sm_90', 'sm_100')
LIMIT_SECONDS = 600
# The verifier does not follow values through memory, which is how blocks of the wavefront scan find their work.
FLAGS = ('-DSSM_LAST_WORK_ITEM',)
# User space addresses of Linux on x86-64 that a heap or a mapping has; no size of the small cases is as large.
_POINTERS = range(0x500000000000, 0x800000000000)
_BARRIER = re.compile(r'^\s+(?:bar\.sync|bar\.warp\.sync|barrier\.sync)\b[^;]*;', re.M)


@dataclasses.dataclass(frozen=True)
class Launch:
    """A kernel's launch, as the host code makes it."""

    kernel: str
    blocks: int
    threads: int
    shared: int
    argument: bytes


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the verifier says about a launch."""

    result: str
    reason: str
    seconds: float

    def __str__(self) -> str:
        return f'{self.result}: {self.reason}' if self.reason else self.result


class Recorder(Interpreter):
    """The operators, with launches that are recorded and not run."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.records: list[Launch] = []

    def _launch(self, kernel: int, blocks: int, threads: int, shared: int, argument: int, argument_bytes: int) -> None:
        name = kernel_report().readable_name(self._symbols[kernel].replace('_GLOBAL__N_1L', '_GLOBAL__N_1'))
        self.records.append(Launch(name, blocks, threads, shared, ctypes.string_at(argument, argument_bytes)))


def _leaf(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.rand(*shape).to(dtype).requires_grad_()


def _rates(*shape: int) -> torch.Tensor:
    return (-torch.rand(*shape)).requires_grad_()


def _sequence(channels: int, states: int, length: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    leaf = functools.partial(_leaf, dtype=dtype)
    u, delta = leaf(1, channels, length), leaf(1, channels, length)
    B, C = leaf(1, states, length), leaf(1, states, length)
    return cuda_ops.selective_scan(u, delta, _rates(channels, states), B, C, _leaf(channels), delta_softplus=True)


def row(channels: int, states: int, length: int) -> torch.Tensor:
    """A scan along a row without skip and softplus."""
    u, delta, B, C = (_leaf(1, size, length) for size in (channels, channels, states, states))
    return cuda_ops.selective_scan(u, delta, _rates(channels, states), B, C)


def _cross(
    channels: int, states: int, height: int, width: int, dtype: torch.dtype = torch.float32, rank: int = 0
) -> torch.Tensor:
    leaf = functools.partial(_leaf, dtype=dtype)
    weight = _leaf(4, channels, rank) if rank else None
    return cuda_ops.cross_selective_scan(
        leaf(1, height, width, channels),
        leaf(1, height, width, 4, rank or channels),
        _rates(4, channels, states),
        leaf(1, height, width, 4, states),
        leaf(1, height, width, 4, states),
        _leaf(4, channels),
        delta_weight=weight,
    )


def _line(channels: int, states: int, height: int, width: int) -> torch.Tensor:
    shape = (1, height, width)
    return cuda_ops.line_scan(
        _leaf(*shape, channels),
        _leaf(*shape, channels),
        _rates(channels, states),
        _leaf(*shape, states),
        _leaf(*shape, states),
        axis='row',
    )


def _wavefront(channels: int, states: int, height: int, width: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    leaf = functools.partial(_leaf, dtype=dtype)
    shape = (1, height, width)
    return cuda_ops.wavefront_scan(
        leaf(*shape, channels),
        leaf(*shape, channels),
        leaf(*shape, channels),
        _rates(channels, states),
        _rates(channels, states),
        leaf(*shape, states),
        leaf(*shape, states),
        leaf(*shape, states),
        _leaf(channels),
    )


# The smallest calls that reach each path: one and several segments, warps and strips; channels and states that fill
# their tiles and groups, and not.
CASES: dict[str, Callable[[], torch.Tensor]] = {
    'sequence of 40, N = 2': lambda: _sequence(32, 2, 40),
    'sequence of 40, N = 16': lambda: _sequence(32, 16, 40),
    'sequence of 12, N = 18, 20 channels': lambda: _sequence(20, 18, 12),
    'sequence of 12, N = 4, 20 channels, float16': lambda: _sequence(20, 4, 12, torch.float16),
    'sequence of 8, N = 2, 40 channels, bfloat16': lambda: _sequence(40, 2, 8, torch.bfloat16),
    '3x5, N = 16': lambda: _cross(32, 16, 3, 5),
    '3x5, N = 1': lambda: _cross(32, 1, 3, 5),
    '3x5, N = 1, 20 channels, bfloat16': lambda: _cross(20, 1, 3, 5, torch.bfloat16),
    '3x5, N = 1, factors of rank 2': lambda: _cross(16, 1, 3, 5, torch.float16, 2),
    '9x9, N = 1': lambda: _cross(16, 1, 9, 9),
    '12x12, N = 2': lambda: _cross(32, 2, 12, 12),
    'lines of 5, N = 2': lambda: _line(32, 2, 2, 5),
    'lines of 5, N = 1': lambda: _line(16, 1, 2, 5),
    'wavefront 3x5, N = 1': lambda: _wavefront(16, 1, 3, 5),
    'wavefront 3x5, N = 2, 10 channels, float16': lambda: _wavefront(10, 2, 3, 5, torch.float16),
    'wavefront 3x5, N = 16': lambda: _wavefront(16, 16, 3, 5),
    'wavefront 9x9, N = 2, two strips and tiles': lambda: _wavefront(20, 2, 9, 9),
    'wavefront 2x3, N = 10': lambda: _wavefront(16, 10, 2, 3),
}


@functools.cache
def _recorder() -> Recorder:
    return Recorder(Path(tempfile.mkdtemp()))


def record(call: Callable[[], torch.Tensor]) -> list[Launch]:
    """The launches of an operator's forward pass, and of its backward pass if it has one: one for each kernel."""
    recorder = _recorder()
    recorder.records.clear()
    with recorder.interpret():
        output = call()
        if output.requires_grad:
            output.sum().backward()
    return list({launch.kernel: launch for launch in recorder.records}.values())


@functools.cache
def kernels(arch: str) -> dict[str, tuple[str, str]]:
    """PTX and symbol of each kernel."""
    found = {}
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        sources = sorted((CSRC / 'cuda').glob('*.cu'))
        for text in pool.map(lambda source: compile_ptx(source, FLAGS, arch), sources):
            for symbol in re.findall(r'\.entry (\w+)\(', text):
                found[kernel_report().readable_name(symbol)] = (text, symbol)
    return found


def _entry(text: str, symbol: str) -> slice:
    begin = text.index(f'.entry {symbol}(')
    return slice(begin, text.index('\n}\n', begin))


def configuration(launch: Launch, symbol: str) -> dict[str, object]:
    """The verifier's input: the launch, with numbers as they are and a name for each tensor."""
    declarations, arguments = [], []
    for offset in range(0, len(launch.argument), 8):
        word = int.from_bytes(launch.argument[offset : offset + 8], 'little')
        if word in _POINTERS:
            declarations.append(
                dict(parameter=0, offset=offset, type='pointer', space='global', object=f'tensor_{word:x}')
            )
            continue
        for part in (offset, offset + 4):
            (value,) = struct.unpack_from('<I', launch.argument, part)
            arguments.append(dict(parameter=0, offset=part, type='u32', value=value))
    # Only one block takes the last work item.
    blocks = 1 if launch.kernel.startswith('wavefront') else launch.blocks
    grid = dict(grid_dim=[blocks, 1, 1], block_dim=[launch.threads, 1, 1], dynamic_shared_bytes=launch.shared)
    return dict(
        schema='spverify.kernel-input/v1',
        entry=symbol,
        launch=grid,
        declarations=declarations,
        arguments=arguments,
    )


def verify(ptx: str, given: dict[str, object], reference: dict[str, object] | None = None) -> Verdict:
    """Run the verifier on a launch, with the source of a reference and its binding if results are to be compared."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / 'kernel.ptx').write_text(ptx)
        (folder / 'input.json').write_text(json.dumps(given))
        command = [
            sys.executable,
            '-m',
            'sentryward',
            str(folder / 'kernel.ptx'),
            '--input',
            str(folder / 'input.json'),
        ]
        command += ['--timeout', str(LIMIT_SECONDS), '--memory-limit-mib', '6000']
        if reference:
            (folder / 'reference.py').write_text(str(reference['reference']))
            (folder / 'reference_binding.json').write_text(json.dumps(reference['binding']))
            command += ['--reference', str(folder / 'reference.py')]
        output = subprocess.run(command, capture_output=True, text=True).stdout
    said = json.loads(output)
    reasons = [diagnostic.get('message') or diagnostic['code'] for diagnostic in said.get('diagnostics', [])]
    return Verdict(said['result'], '; '.join(dict.fromkeys(reasons)), time.monotonic() - began)


def without_barriers(ptx: str, symbol: str) -> Iterator[str]:
    """The PTX with one barrier of a kernel less, for each of its barriers."""
    part = _entry(ptx, symbol)
    body = ptx[part]
    for barrier in _BARRIER.finditer(body):
        yield ptx[: part.start] + body[: barrier.start()] + body[barrier.end() :] + ptx[part.stop :]
