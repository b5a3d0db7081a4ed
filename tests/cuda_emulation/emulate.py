"""Compile the CUDA kernels for the CPU, with the headers in this folder, and let them serve tensors on the CPU."""

import contextlib
import ctypes
import dataclasses
import functools
import importlib
import os
import shutil
import subprocess
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from cuda_ops import _build, route_scan

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
WITHOUT_FLOAT16 = ['-include', str(FOLDER / 'without_float16.h')]
CSRC = ROOT / 'cuda_ops' / 'csrc'
OPERATORS = ('route_scan', 'route_scan_backward', 'wavefront_scan', 'wavefront_scan_backward')
SANITIZE_VARIABLE = 'SSM_EMULATION_SANITIZE'
SANITIZERS = [
    '-g1',
    '-fsanitize=address,alignment,bounds,shift,signed-integer-overflow,null',
    '-fno-sanitize-recover=all',
]
# An H200's.
SHARED_LIMIT, MULTIPROCESSORS = 227 * 1024, 132


def compiler() -> str | None:
    """g++, whose sanitizers the tests use."""
    return shutil.which('g++')


def compile_for_cpu(sources: Sequence[Path], target: Path, flags: Sequence[str]) -> None:
    """Compile ``.cu`` and ``.cpp`` sources, two at a time, and link them."""
    target.parent.mkdir(parents=True, exist_ok=True)
    common = [
        str(compiler()),
        '-std=c++17',
        '-O1',
        '-fPIC',
        '-fvisibility=hidden',
        '-Wall',
        '-Werror',
        '-Wno-unknown-pragmas',
        f'-I{FOLDER / "include"}',
        f'-I{CSRC}',
        *flags,
    ]
    objects = [target.with_name(f'{target.name}.{source.stem}.o') for source in sources]
    commands = [
        [*common, '-x', 'c++', '-c', str(source), '-o', str(path)]
        for source, path in zip(sources, objects, strict=True)
    ]
    running: list[subprocess.Popen[str]] = []
    for command in commands:
        if len(running) == (os.cpu_count() or 1):
            _finish(running.pop(0))
        running.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
    for process in running:
        _finish(process)
    link = ['-shared'] if target.suffix == '.so' else []
    subprocess.run([*common, *link, *map(str, objects), '-o', str(target)], check=True)


def _finish(process: 'subprocess.Popen[str]') -> None:
    messages = process.communicate()[1]
    assert process.returncode == 0, messages


@functools.cache
def _bind_operators() -> ctypes.CDLL:
    """Load the ops' bindings as operators of the namespace ``cuda_ops_emulation``, compiled once for a checkout.

    The user's library has no hook for the tests: these are the same sources, compiled once more.
    """
    folder = ROOT / 'build' / 'emulation'
    folder.mkdir(parents=True, exist_ok=True)
    command = [str(compiler())]
    steps = [
        dataclasses.replace(step, argv=(*step.argv, '-O0', '-DSSM_EMULATION'))
        for step in _build.binding_steps(CSRC, folder, command, torch, with_cuda=False)
        if step.output.stem != 'library_bindings'
    ]
    source, output = FOLDER / 'operators.cpp', folder / 'operators.o'
    argv = (
        *command,
        '-MMD',
        '-MF',
        f'{output}.d',
        '-std=c++17',
        '-fPIC',
        f'-I{CSRC}',
        '-c',
        str(source),
        '-o',
        str(output),
    )
    steps.append(_build.Step(output, (source,), argv))
    library = folder / 'operators.so'
    steps.append(_build.link_step(library, [step.output for step in steps], command, None))
    with _build.exclusive(folder / 'lock'):
        _build.run_steps(steps, folder)
    torch.ops.load_library(str(library))
    operators = torch.library.Library('cuda_ops_emulation', 'DEF')
    _bind_operators.library = operators  # type: ignore[attr-defined]  # its definitions last as long as it does
    for name in OPERATORS:
        operators.define(str(getattr(torch.ops.cuda_ops, name).default._schema).replace('cuda_ops::', '', 1))
    return ctypes.CDLL(str(library))


class Emulation:
    """The kernels, compiled for the CPU; with sanitizers where the variable says so."""

    def __init__(self, folder: Path, flags: Sequence[str] = (), sources: Sequence[Path] | None = None) -> None:
        target = folder / 'libemulation.so'
        if os.environ.get(SANITIZE_VARIABLE):
            flags = [*flags, *SANITIZERS]
        sources = sorted((CSRC / 'cuda').glob('*.cu')) if sources is None else sources
        compile_for_cpu([*sources, FOLDER / 'emulation.cpp'], target, flags)
        self._kernels = ctypes.CDLL(str(target))
        self._kernels.emulated_kernels.restype = ctypes.c_void_p
        self._kernels.emulation_launches.restype = self._kernels.emulation_blocks.restype = ctypes.c_int64
        self._operators = _bind_operators()
        self._operators.emulation_use.argtypes = [ctypes.c_void_p]

    @contextlib.contextmanager
    def serve(
        self,
        seed: int = 0,
        shared_limit: int = SHARED_LIMIT,
        multiprocessors: int = MULTIPROCESSORS,
        residents: int = 4,
        fail_launch: int = -1,
    ) -> Iterator[None]:
        """Within the context the ops run the CUDA kernels, with the chunks they have on a GPU.

        Args:
            seed: of the order in which threads and blocks go on.
            shared_limit: bytes of shared memory that a block may have.
            multiprocessors: what the device says it has; a persistent kernel has a block for each of them.
            residents: blocks of a launch that really run at the same time.
            fail_launch: the number of the launch that fails, counted from 0.
        """
        # By its name, since the package has the public function under it.
        wavefront = importlib.import_module('cuda_ops.wavefront_scan')
        chunk_length, chunk_lines = route_scan._chunk_length, wavefront._chunk_lines
        on_gpu = route_scan._on_gpu
        self._kernels.emulation_set(seed, shared_limit, multiprocessors, residents, fail_launch)
        self._operators.emulation_use(self._kernels.emulated_kernels())
        overrides = torch.library.Library('cuda_ops', 'IMPL')
        with warnings.catch_warnings():
            warnings.filterwarnings('ignore', 'Warning only once for all operators', UserWarning)
            for name in OPERATORS:
                overrides.impl(name, getattr(torch.ops.cuda_ops_emulation, name).default, 'CPU')
        route_scan._chunk_length = lambda states, device_type: chunk_length(states, 'cuda')
        route_scan._on_gpu = lambda x: True
        wavefront._chunk_lines = lambda height, width, states, device_type: chunk_lines(height, width, states, 'cuda')
        try:
            yield
        finally:
            route_scan._chunk_length, wavefront._chunk_lines = chunk_length, chunk_lines
            route_scan._on_gpu = on_gpu
            overrides._destroy()

    @property
    def launches(self) -> int:
        """Kernels launched since the context began."""
        return self._kernels.emulation_launches()

    @property
    def blocks(self) -> int:
        """Blocks run since then."""
        return self._kernels.emulation_blocks()
