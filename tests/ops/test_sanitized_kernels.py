"""The CPU kernels and their bindings under the address, undefined-behaviour and thread sanitizers: `make sanitize`.

``test_emulated_kernels.py`` has the CUDA kernels' own.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cuda_ops import _build, _library
from tests.cuda_emulation.emulate import compiler
from tests.ops.helpers import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(compiler() is None, reason='the kernels are compiled by g++, which is not there'),
    pytest.mark.skipif(not _library.STATUS.compiled, reason='the ops are not compiled'),
]

CSRC = ROOT / 'cuda_ops' / 'csrc'
COMMON = ('-O1', '-g1', '-fno-omit-frame-pointer')
FLAGS = {
    # The bindings' classes come from torch, which is not instrumented.
    'address': ('-fsanitize=address,undefined', '-fno-sanitize=vptr', '-fno-sanitize-recover=all'),
    'thread': ('-fsanitize=thread', '-include', str(Path(__file__).with_name('std_threads.h'))),
}
RUNTIMES = {'address': 'libasan.so', 'thread': 'libtsan.so'}
OPTIONS = {
    # The interpreter's own leaks are not the kernels'.
    'ASAN_OPTIONS': 'detect_leaks=0:detect_stack_use_after_return=0:alloc_dealloc_mismatch=0',
    'UBSAN_OPTIONS': 'print_stacktrace=1',
    'TSAN_OPTIONS': 'exitcode=66:halt_on_error=0',
}
# By file; those that start other interpreters, or compile, are left out.
TESTS = {
    'address': {
        'test_route_scans.py': 'not compile',
        'test_wavefront_scan.py': 'not compile',
        'test_memory.py': 'not hidden_states',
        'test_extremes.py': 'not (compiled or reference)',
    },
    'thread': {
        'test_memory.py': 'threads_and_runs',
        'test_wavefront_properties.py': 'threads_and_runs',
        'test_integration.py': 'concurrent_calls',
    },
}


def build(kind: str, folder: Path) -> Path:
    """A folder with the package whose library is compiled with a sanitizer; kept from one run to the next."""
    objects = ROOT / 'build' / 'sanitized' / kind
    objects.mkdir(parents=True, exist_ok=True)
    command = [str(compiler())]
    steps = [
        dataclasses.replace(step, argv=(*step.argv, *COMMON, *FLAGS[kind]))
        for step in (
            *_build.binding_steps(CSRC, objects, command, torch, with_cuda=False),
            *_build.cpu_steps(CSRC, objects, command, platform.machine()),
        )
    ]
    library = objects / _build.LIBRARY_NAME
    link = _build.link_step(library, [step.output for step in steps], command, None)
    steps.append(dataclasses.replace(link, argv=(*link.argv, FLAGS[kind][0])))
    with _build.exclusive(objects / 'lock'):
        _build.run_steps(steps, objects)
    shutil.copytree(ROOT / 'cuda_ops', folder / 'cuda_ops', ignore=shutil.ignore_patterns('__pycache__', '*.so'))
    shutil.copy(library, folder / 'cuda_ops')
    return folder


def run(kind: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python, in which a sanitizer's runtime comes before everything else, with the package of the folder."""
    runtime = subprocess.run(
        [str(compiler()), f'-print-file-name={RUNTIMES[kind]}'], capture_output=True, text=True, check=True
    ).stdout.strip()
    environment = os.environ | OPTIONS
    environment |= {
        'LD_PRELOAD': runtime,
        'PYTHONPATH': os.pathsep.join([str(folder), str(ROOT)]),
        'OMP_NUM_THREADS': '1' if kind == 'thread' else '2',
        'SSM_OPS_STRICT': '1',
    }
    # The thread sanitizer needs its own addresses, which a layout drawn at random may take.
    fixed = ['setarch', platform.machine(), '-R'] if kind == 'thread' and shutil.which('setarch') else []
    return subprocess.run(
        [*fixed, sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=1800
    )


@pytest.fixture(params=FLAGS)
def sanitized(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    return request.param, build(request.param, tmp_path)


def test_the_tests_find_nothing_under_a_sanitizer(sanitized: tuple[str, Path]) -> None:
    kind, folder = sanitized
    result = run(kind, folder, '-c', 'import cuda_ops; print(cuda_ops.__file__, cuda_ops.backend_status())')
    assert result.returncode == 0 and str(folder) in result.stdout, result.stdout + result.stderr
    for file, expression in TESTS[kind].items():
        result = run(
            kind,
            folder,
            *(
                '-m',
                'pytest',
                '-q',
                '-x',
                '-p',
                'no:cacheprovider',
                f'--rootdir={ROOT}',
                '-c',
                f'{ROOT}/pyproject.toml',
            ),
            *('--durations=0', '-k', expression, str(Path(__file__).with_name(file))),
        )
        output = result.stdout[-5000:] + result.stderr[-5000:]
        assert result.returncode == 0 and 'WARNING: ThreadSanitizer' not in output and ' passed' in output, output
