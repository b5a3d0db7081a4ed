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
import resource
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

import cuda_ops
from tests.cuda_emulation.emulate import CSRC, SHARED_LIMIT
from tests.ops.helpers import differentiate, dtype_name, rounded
from tests.ops.route_cases import Case, Cross, Factors, Lines, Sequence
from tests.ops.wavefront_cases import PARAMETERS as WAVEFRONT_PARAMETERS
from tests.ops.wavefront_cases import Wavefront
from tests.ptx.interpret import Interpreter, compile_ptx, kernel_report

ARCHS = ('sm_90', 'sm_100')
LIMIT_SECONDS = 3600  # not of a processor: a verdict takes longer where others run, too
# The verifier does not follow values through global memory, which is how blocks of the wavefront scan find their work,
# nor always through shared memory, which is how lanes of the route scan with one state find their pixels.
FLAGS = ('-DSSM_LAST_WORK_ITEM', '-DSSM_OWN_INDICES')
# User space addresses of Linux on x86-64 that a heap or a mapping has; no size of the small cases is as large.
_POINTERS = range(0x500000000000, 0x800000000000)
_BARRIER = re.compile(r'^\s+(?:bar\.sync|bar\.warp\.sync|barrier\.sync)\b[^;]*;', re.M)
_BFI = re.compile(r'^[ \t]+bfi\.b32\s+(%r\d+), (%?\w+), (%?\w+), (\d+), (\d+);', re.M)


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
    seconds: float  # of a processor

    def __str__(self) -> str:
        return f'{self.result}: {self.reason}' if self.reason else self.result


class Recorder(Interpreter):
    """The operators, with launches that are recorded and not run."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.records: list[Launch] = []

    def _run(self, name: str, blocks: int, threads: int, shared: int, argument: int, argument_bytes: int) -> None:
        self.records.append(Launch(name, blocks, threads, shared, ctypes.string_at(argument, argument_bytes)))


@dataclasses.dataclass(frozen=True)
class Call:
    """A small call of an operator, forward and, where it trains, backward."""

    case: Case | Wavefront
    dtype: torch.dtype = torch.float32
    shared_limit: int = SHARED_LIMIT
    kernels: str = ''  # how the names of those begin that are to be proven
    trains: bool = True  # if not, no states are saved

    def __str__(self) -> str:
        name = f'{type(self.case).__name__.lower()}-{self.case}-{dtype_name(self.dtype)}'
        return name if self.trains else f'{name}-inference'

    def launches(self) -> list[Launch]:
        """The last launch of each of its kernels."""
        case = self.case
        function, parameters = (
            (cuda_ops.wavefront_scan, WAVEFRONT_PARAMETERS)
            if isinstance(case, Wavefront)
            else (case.function, case.parameters())
        )
        recorder = _recorder()
        recorder.records.clear()
        with recorder.interpret(shared_limit=self.shared_limit):
            inputs, options = rounded(case.inputs(), parameters, self.dtype), case.options()
            if self.trains:
                differentiate(function, inputs, options)
            else:
                with torch.no_grad():
                    function(**inputs, **options)
        found = {launch.kernel: launch for launch in recorder.records}
        return [launch for name, launch in found.items() if name.startswith(self.kernels)]


# The smallest calls that reach each path: one and several segments, chunks, warps and strips; channels and states that
# fill their tiles and groups, and not; the dtypes in turn. Larger ones take the verifier hours. Maps of one state are
# divided into segments of 512 positions, where a block's shared memory does not hold them.
CALLS = (
    Call(Sequence(1, 32, 40, 2)),
    Call(Sequence(1, 32, 20, 16)),
    Call(Sequence(1, 20, 4, 18)),
    Call(Sequence(1, 20, 12, 4), torch.float16),
    Call(Sequence(1, 40, 8, 2), torch.bfloat16),
    Call(Cross(1, 2, 3, 32, 16)),
    Call(Cross(1, 5, 14, 32, 2)),
    Call(Lines(1, 2, 3, 32, 2, 'row')),
    Call(Lines(1, 2, 3, 16, 1, 'column', reverse=True)),
    Call(Cross(1, 5, 7, 16, 1)),
    Call(Cross(1, 3, 5, 20, 1), torch.bfloat16),
    Call(Factors(1, 3, 5, 16, 1, rank=2), torch.float16),
    Call(Sequence(1, 16, 675, 1), shared_limit=48 * 1024, kernels='segment_aggregates_n1'),
    Call(Factors(1, 25, 27, 16, 1, rank=2), torch.float16, 48 * 1024, 'segment_aggregates_n1'),
    Call(Wavefront(1, 2, 3, 16, 1)),
    Call(Wavefront(1, 2, 3, 10, 2), torch.float16),
    Call(Wavefront(1, 2, 3, 16, 16)),
    Call(Wavefront(1, 2, 3, 16, 8)),
    Call(Wavefront(1, 9, 2, 20, 2)),
    *(Call(case, trains=False) for case in (Sequence(1, 32, 40, 2), Cross(1, 5, 7, 16, 1), Wavefront(1, 9, 2, 20, 2))),
)


@functools.cache
def _recorder() -> Recorder:
    return Recorder(Path(tempfile.mkdtemp()))


@functools.cache
def kernels(arch: str) -> dict[str, tuple[str, str]]:
    """PTX and symbol of each kernel."""
    found = {}
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        sources = sorted((CSRC / 'cuda').glob('*.cu'))
        for text in pool.map(lambda source: without_bfi(compile_ptx(source, FLAGS, arch)), sources):
            for symbol in re.findall(r'\.entry (\w+)\(', text):
                found[kernel_report().readable_name(symbol)] = (text, symbol)
    return found


def without_bfi(ptx: str) -> str:
    """The same with each ``bfi``, which the verifier does not evaluate, as the instructions that it stands for.

    An address that one goes into would be any address to it, and a branch undecided.
    """

    def expand(found: re.Match[str]) -> str:
        result, inserted, base, position, length = found.groups()
        ones = (1 << int(length)) - 1
        lines = (
            f'and.b32 %bfi1, {inserted}, {ones};',
            f'shl.b32 %bfi1, %bfi1, {position};',
            f'and.b32 %bfi2, {base}, {~(ones << int(position))};',
            f'or.b32 {result}, %bfi1, %bfi2;',
        )
        return '\n'.join(f'\t{line}' for line in lines)

    return re.sub(r'^\{$', '{\n\t.reg .b32 %bfi<3>;', _BFI.sub(expand, ptx), flags=re.M)


def entry(text: str, symbol: str) -> slice:
    """Where a kernel is in a file."""
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
    began = resource.getrusage(resource.RUSAGE_CHILDREN)
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
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = ended.ru_utime - began.ru_utime + ended.ru_stime - began.ru_stime
    return Verdict(said['result'], '; '.join(dict.fromkeys(reasons)), seconds)


def without_barriers(ptx: str, symbol: str) -> Iterator[str]:
    """The PTX with one barrier of a kernel less, for each of its barriers."""
    part = entry(ptx, symbol)
    body = ptx[part]
    for barrier in _BARRIER.finditer(body):
        yield ptx[: part.start] + body[: barrier.start()] + body[barrier.end() :] + ptx[part.stop :]
