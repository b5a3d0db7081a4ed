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
from collections.abc import Iterator
from pathlib import Path

import torch

import cuda_ops
from tests.cuda_emulation.emulate import CSRC
from tests.ops.helpers import differentiate, rounded
from tests.ops.route_cases import Case, Cross, Factors, Lines, Sequence
from tests.ops.wavefront_cases import PARAMETERS as WAVEFRONT_PARAMETERS
from tests.ops.wavefront_cases import Wavefront
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

    def _run(self, name: str, blocks: int, threads: int, shared: int, argument: int, argument_bytes: int) -> None:
        self.records.append(Launch(name, blocks, threads, shared, ctypes.string_at(argument, argument_bytes)))


# The smallest calls that reach each path: one and several segments, warps and strips; channels and states that fill
# their tiles and groups, and not. Larger ones take the verifier hours.
CASES: tuple[tuple[Case | Wavefront, torch.dtype], ...] = (
    (Sequence(1, 32, 40, 2), torch.float32),
    (Sequence(1, 32, 40, 16), torch.float32),
    (Sequence(1, 20, 12, 18), torch.float32),
    (Sequence(1, 20, 12, 4), torch.float16),
    (Sequence(1, 40, 8, 2), torch.bfloat16),
    (Cross(1, 3, 5, 32, 16), torch.float32),
    (Cross(1, 3, 5, 32, 1), torch.float32),
    (Cross(1, 3, 5, 20, 1), torch.bfloat16),
    (Factors(1, 3, 5, 16, 1, rank=2), torch.float16),
    (Cross(1, 9, 9, 16, 1), torch.float32),
    (Cross(1, 12, 12, 32, 2), torch.float32),
    (Lines(1, 2, 5, 32, 2, 'row'), torch.float32),
    (Lines(1, 2, 5, 16, 1, 'column', reverse=True), torch.float32),
    (Wavefront(1, 3, 5, 16, 1), torch.float32),
    (Wavefront(1, 3, 5, 10, 2, reverse=True), torch.float16),
    (Wavefront(1, 3, 5, 16, 16), torch.float32),
    (Wavefront(1, 9, 9, 20, 2), torch.float32),
    (Wavefront(1, 2, 3, 16, 10), torch.float32),
)


@functools.cache
def _recorder() -> Recorder:
    return Recorder(Path(tempfile.mkdtemp()))


def record(case: Case | Wavefront, dtype: torch.dtype) -> list[Launch]:
    """The launches of a case, forward and backward: one for each kernel."""
    function, parameters = (
        (cuda_ops.wavefront_scan, WAVEFRONT_PARAMETERS)
        if isinstance(case, Wavefront)
        else (case.function, case.parameters())
    )
    recorder = _recorder()
    recorder.records.clear()
    with recorder.interpret():
        differentiate(function, rounded(case.inputs(), parameters, dtype), case.options())
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
