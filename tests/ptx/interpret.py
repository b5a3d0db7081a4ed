"""Run what nvcc compiled: the operators' launches, executed from the kernels' PTX on tensors on the CPU."""

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from zlib import crc32

import torch

from cuda_ops import _build
from tests.cuda_emulation.emulate import CSRC, ROOT, Emulation
from tests.cuda_emulation.emulate import FOLDER as EMULATION_FOLDER
from tests.ptx import parse

MACHINE = Path(__file__).resolve().parent / 'machine'
FEW_HEADER = Path(__file__).resolve().with_name('few.h')
WITHOUT_ROUTE_SCAN = FEW_HEADER.with_name('without_route_scan.cpp')
FEW = ['-include', str(FEW_HEADER)]
CACHE = ROOT / 'build' / 'ptx'
ARCH = 'sm_90'
_LAUNCHER = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_size_t
)


class Settings(ctypes.Structure):
    """``ptx::Settings``."""

    _fields_ = [
        ('seed', ctypes.c_uint32),
        ('residents', ctypes.c_int32),
        ('checks_races', ctypes.c_int32),
        ('delays', ctypes.c_int32),
    ]


class Constant(ctypes.Structure):
    """``ptx::Constant``."""

    _fields_ = [('slot', ctypes.c_int32), ('value', ctypes.c_uint64)]


@functools.cache
def toolkit() -> '_build.Toolkit | None':
    """nvcc, if there is one that runs."""
    return _build.find_toolkit()


@functools.cache
def kernel_report() -> ModuleType:
    """tools/kernel_report.py, which knows the kernels' names."""
    spec = importlib.util.spec_from_file_location('kernel_report', ROOT / 'tools' / 'kernel_report.py')
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _cached(name: str, inputs: Sequence[Path], command: Callable[[Path], list[str]]) -> Path:
    """The output of a command, made once for the inputs and the command."""
    CACHE.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(repr(command(Path(name))).encode())
    for path in inputs:
        digest.update(path.read_bytes())
    stem, suffix = name.rsplit('.', 1)
    output = CACHE / f'{stem}.{digest.hexdigest()[:16]}.{suffix}'
    with _build.exclusive(CACHE / f'{name}.lock'):
        if not output.exists():
            unfinished = output.with_suffix('.unfinished')
            result = subprocess.run(command(unfinished), capture_output=True, text=True)
            assert result.returncode == 0, result.stdout + result.stderr
            for old in CACHE.glob(f'{stem}.*.{suffix}'):
                old.unlink()
            unfinished.rename(output)
    return output


def compile_ptx(source: Path, flags: Sequence[str] = (), arch: str = ARCH) -> str:
    """The PTX of a ``.cu`` file; the flags ``FEW`` leave out most kernels, to be quick."""
    found = toolkit()
    assert found
    options = [str(found.nvcc), *found.host, '-O3', '-std=c++17', f'-I{CSRC}', '-ptx', f'-arch={arch}', '-lineinfo']
    options += flags
    inputs = [path for path in [*CSRC.rglob('*'), source, FEW_HEADER] if path.suffix in ('.h', '.cuh', '.cu')]
    kind = f'{crc32(repr(flags).encode()):x}-' if flags else ''  # so that each kind keeps its own file
    name = f'{source.stem}-{kind}{arch}.ptx'
    path = _cached(name, sorted(inputs), lambda output: [*options, str(source), '-o', str(output)])
    return path.read_text()


@functools.cache
def machine() -> ctypes.CDLL:
    """The interpreter."""
    flags = ['-std=c++20', '-O1', '-Wall', '-Werror', '-fPIC', '-shared', '-fvisibility=hidden', '-ffp-contract=off']
    include = EMULATION_FOLDER / 'include'
    inputs = sorted([*MACHINE.glob('*'), *include.glob('*')])
    source = MACHINE / 'machine.cpp'
    library = ctypes.CDLL(
        str(_cached('machine.so', inputs, lambda out: ['g++', *flags, f'-I{include}', str(source), '-o', str(out)]))
    )
    library.ptx_name.restype = library.ptx_message.restype = ctypes.c_char_p
    library.ptx_parameters.restype = library.ptx_shared.restype = ctypes.c_uint64
    library.ptx_run.restype = ctypes.c_int64
    return library


@functools.cache
def allocations() -> ctypes.CDLL:
    """What can watch the allocation of tensors."""
    folder = Path(torch.__file__).parent
    flags = ['-std=c++17', '-O0', '-fPIC', '-shared', f'-I{folder / "include"}']
    library = [f'-L{folder / "lib"}', '-lc10', f'-Wl,-rpath,{folder / "lib"}']
    source = MACHINE / 'allocations.cpp'
    return ctypes.CDLL(
        str(_cached('allocations.so', [source], lambda out: ['g++', *flags, str(source), '-o', str(out), *library]))
    )


@contextlib.contextmanager
def watched_tensors() -> Iterator[None]:
    """Kernels may access the tensors that are allocated within the context."""
    allocations().allocations_watch(1)
    try:
        yield
    finally:
        allocations().allocations_watch(0)


@functools.cache
def functions() -> dict[str, int]:
    """Numbers of the arithmetic instructions."""
    names: dict[str, int] = {}
    while name := machine().ptx_name(len(names)):
        names[name.decode()] = len(names)
    return names


def read_ptx(text: str) -> parse.File:
    """The kernels of a file."""
    return parse.File(text, functions(), {'param': machine().ptx_parameters(), 'shared': machine().ptx_shared()})


def _with_headers(source: Path) -> str:
    text = source.read_text()
    return text + ''.join(_with_headers(source.parent / name) for name in re.findall(r'#include "(.*\.cuh)"', text))


class FaultFound(Exception):
    """What a kernel did wrong."""


class Program:
    """A kernel, ready to run."""

    def __init__(self, kernel: parse.Kernel) -> None:
        self.kernel = kernel
        self._code = (parse.Instruction * len(kernel.code))(*kernel.code)
        self._constants = (Constant * len(kernel.constants))(*kernel.constants.items())
        self._specials = (ctypes.c_int32 * len(parse.SPECIALS))(*(kernel.slots.get(n, -1) for n in parse.SPECIALS))

    def launch(
        self,
        arguments: ctypes.Structure,
        blocks: int,
        threads: int,
        shared: int = 0,
        *,
        seed: int = 0,
        residents: int = 3,
        checks_races: bool = True,
        delays: bool = True,
    ) -> int:
        """Run it on its own, with these arguments."""
        settings = Settings(seed, residents, checks_races, delays)
        return self.run(settings, blocks, threads, shared, ctypes.addressof(arguments), ctypes.sizeof(arguments))

    def run(
        self, settings: Settings, blocks: int, threads: int, shared: int, argument: int | None, argument_bytes: int
    ) -> int:
        """Launch it; the number of instructions that warps executed.

        Args:
            settings: The machine's.
            blocks: Of the grid.
            threads: Of a block.
            shared: Bytes of a block's dynamic shared memory.
            argument: Address of the kernel's argument.
            argument_bytes: Its size.

        Raises:
            FaultFound: For a race, an access out of bounds and the like.
        """
        steps = machine().ptx_run(
            self._code,
            ctypes.c_int64(len(self._code)),
            self._constants,
            ctypes.c_int64(len(self._constants)),
            ctypes.c_int32(len(self.kernel.slots)),
            self._specials,
            ctypes.byref(settings),
            allocations().allocations_extent,
            ctypes.c_int64(blocks),
            ctypes.c_int32(threads),
            ctypes.c_int64(shared),
            ctypes.c_void_p(argument),
            ctypes.c_int64(argument_bytes),
        )
        if steps < 0:
            message = machine().ptx_message().decode()
            raise FaultFound(re.sub(r'<(\d+)>', lambda found: self.kernel.describe(int(found.group(1))), message))
        return steps


class Interpreter(Emulation):
    """The operators, with launches that run the kernels' PTX.

    The host code is compiled by g++, as for the emulation; so are the kernels, which gives their addresses, and are
    never run.

    Args:
        folder: For what is compiled.
        few: Compile a few kernels of the wavefront scan alone: bfloat16 and four states.
        arch: What nvcc compiles for.
    """

    def __init__(self, folder: Path, few: bool = False, arch: str = ARCH) -> None:
        cuda = CSRC / 'cuda'
        sources = [cuda / 'kernels.cu', *cuda.glob('wavefront*.cu'), WITHOUT_ROUTE_SCAN] if few else None
        super().__init__(folder, ['-O0', '-g0', '-w', *(FEW if few else [])], sources)
        self._few, self._arch = few, arch
        self._symbols = self._read_symbols(folder / 'libemulation.so')
        self._programs: dict[str, Program] = {}
        self._launcher = _LAUNCHER(self._launch)
        self._settings = Settings()
        self._edit: Callable[[str], str] | None = None
        self.launched: list[str] = []
        self.steps = 0

    def _read_symbols(self, library: Path) -> dict[int, str]:
        listed = subprocess.run(['nm', str(library)], capture_output=True, text=True, check=True).stdout
        entries = re.findall(r'^([0-9a-f]+) [tT] (\S+)$', listed, re.M)
        known = next(int(address, 16) for address, name in entries if name == 'emulation_launches')
        base = ctypes.cast(self._kernels.emulation_launches, ctypes.c_void_p).value - known
        return {base + int(address, 16): name for address, name in entries}

    def _load(self, name: str) -> Program:
        if name not in self._programs:
            template = re.compile(rf'\b{name.partition("<")[0]}\b')
            for source in sorted((CSRC / 'cuda').glob('*.cu')):
                if not template.search(_with_headers(source)):
                    continue
                text = compile_ptx(source, FEW if self._few else (), self._arch)
                file = read_ptx(self._edit(text) if self._edit else text)
                for symbol in file.kernels:
                    if kernel_report().readable_name(symbol) == name:
                        self._programs[name] = Program(file.kernel(symbol))
                        return self._programs[name]
        return self._programs[name]

    def _launch(self, kernel: int, blocks: int, threads: int, shared: int, argument: int, argument_bytes: int) -> None:
        try:
            # g++ marks functions without linkage, which kernels are not for nvcc.
            name = kernel_report().readable_name(self._symbols[kernel].replace('_GLOBAL__N_1L', '_GLOBAL__N_1'))
            self.launched.append(name)
            self._run(name, blocks, threads, shared, argument, argument_bytes)
        except Exception as error:
            self._kernels.emulation_fail(f'{type(error).__name__}: {error}'.encode())

    def _run(self, name: str, blocks: int, threads: int, shared: int, argument: int, argument_bytes: int) -> None:
        self.steps += self._load(name).run(self._settings, blocks, threads, shared, argument, argument_bytes)

    @contextlib.contextmanager
    def interpret(
        self,
        seed: int = 0,
        residents: int = 3,
        checks_races: bool = True,
        delays: bool = True,
        edit: Callable[[str], str] | None = None,
        **options: int,
    ) -> Iterator[None]:
        """Within the context the ops run the kernels' PTX.

        Tensors that a kernel accesses must have been allocated within one.

        Args:
            seed: Of the order of blocks, warps and diverged lanes, and of what is delayed.
            residents: Blocks that run at the same time.
            checks_races: Whether a race is an error.
            delays: Whether other blocks see writes as late as the memory model allows.
            edit: Changes the PTX of a file, to plant a fault.
            options: Those of ``serve``.
        """
        self._settings = Settings(seed, residents, checks_races, delays)
        self.launched.clear()
        if edit or self._edit:
            self._programs.clear()
        self._edit = edit
        self._kernels.emulation_launch_by(self._launcher)
        try:
            with watched_tensors(), self.serve(seed=seed, **options):
                yield
        finally:
            self._kernels.emulation_launch_by(_LAUNCHER())
