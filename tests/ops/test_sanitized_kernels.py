"""The CPU kernels under the address, undefined-behaviour and thread sanitizers (`make sanitize`).

``sanitized_kernels.cpp`` calls them without torch, which is not instrumented. The CUDA kernels' own sanitized runs are
in ``test_emulated_kernels.py``.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from cuda_ops import _build
from tests.cuda_emulation.emulate import compiler
from tests.ops.helpers import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(compiler() is None, reason='the kernels are compiled by g++, which is not there'),
]

CSRC = ROOT / 'cuda_ops' / 'csrc'
DRIVER = Path(__file__).with_name('sanitized_kernels.cpp')
# Optimised kernels take minutes to compile with the checks.
OPTIMISATION = '-O0'
FLAGS = {
    'address': ('-fsanitize=address,undefined', '-fno-sanitize-recover=all'),
    'thread': ('-fsanitize=thread',),
}
CAPABILITIES = {
    'baseline': set(),
    'avx2': {'avx2', 'fma'},
    'avx512': {'avx512f', 'avx512bw', 'avx512dq', 'avx512vl'},
}
# A change of the sources, and what the sanitizer says to it.
FAULTS = {
    'an access out of bounds': (
        'address',
        'cpu/route_tile.h',
        'min_of(units * (item.tile + 1) / split_.tiles * kCpuChannelUnit, group_channels)',
        'units * (item.tile + 1) / split_.tiles * kCpuChannelUnit',
        'AddressSanitizer: heap-buffer-overflow',
    ),
    'undefined behaviour': (
        'address',
        'cpu/simd.h',
        'uint32_t(source->bits) << 16',
        'uint32_t(source->bits) << (source->bits ? 32 : 16)',
        'runtime error: shift exponent 32',
    ),
    'a data race': (
        'thread',
        'cpu/route_gradients.h',
        '((item_.part * p_.batch + item_.batch)',
        '((0 * p_.batch + item_.batch)',
        'ThreadSanitizer: data race',
    ),
}


def build(kind: str, capability: str, folder: Path, csrc: Path = CSRC) -> Path:
    """Compile the kernels for an instruction set, and their driver, with a sanitizer; what is up to date is kept."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [str(compiler())]
    driver = folder / 'driver.o'
    compile_driver = [*command, '-MMD', '-MF', f'{driver}.d', '-std=c++17', '-Wall', f'-I{csrc}', '-c', str(DRIVER)]
    steps = [
        *_build.cpu_steps(csrc, folder, command, platform.machine()),
        _build.Step(driver, (DRIVER,), (*compile_driver, '-o', str(driver))),
    ]
    steps = [
        dataclasses.replace(step, argv=(*step.argv, OPTIMISATION, '-g1', *FLAGS[kind]))
        for step in steps
        if step.output.name in ('scan_dispatch.o', 'driver.o') or step.output.name.endswith(f'.{capability}.o')
    ]
    program, objects = folder / f'kernels_{capability}', tuple(step.output for step in steps)
    # The kernels of other instruction sets are not called either.
    link = [*command, *FLAGS[kind], '-Wl,--unresolved-symbols=ignore-in-object-files', '-pthread']
    steps.append(_build.Step(program, objects, (*link, *map(str, objects), '-o', str(program))))
    with _build.exclusive(folder / 'lock'):
        _build.run_steps(steps, folder)
    return program


def run(kind: str, program: Path, capability: str, cases: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    # The thread sanitizer needs its own addresses, which a layout drawn at random may take.
    fixed = ['setarch', platform.machine(), '-R'] if kind == 'thread' and shutil.which('setarch') else []
    return subprocess.run(
        [*fixed, str(program), str(cases), *arguments],
        env=os.environ | {'SSM_OPS_CPU_CAPABILITY': capability},
        capture_output=True,
        text=True,
        timeout=3000,
    )


def capabilities() -> list[str]:
    """The instruction sets that this processor has and the kernels are compiled for."""
    info = Path('/proc/cpuinfo')
    found = set(info.read_text(encoding='utf-8').split()) if info.exists() else set()
    return [name for name in _build.cpu_capabilities(platform.machine()) if CAPABILITIES[name] <= found]


@pytest.mark.parametrize(
    ('kind', 'capability'),
    # Which thread writes where does not depend on the instructions.
    [*(('address', capability) for capability in _build.cpu_capabilities(platform.machine())), ('thread', 'baseline')],
)
def test_sanitizers_find_nothing(kind: str, capability: str) -> None:
    if capability not in capabilities():
        pytest.skip(f'this processor has no {capability}')
    program = build(kind, capability, ROOT / 'build' / 'sanitized' / kind)
    result = run(kind, program, capability, 300 if kind == 'address' else 60)
    assert result.returncode == 0, result.stderr[-5000:]
    assert f'cases by {capability}' in result.stdout


@pytest.mark.parametrize('fault', FAULTS)
def test_sanitizers_find(fault: str, tmp_path: Path) -> None:
    kind, file, right, wrong, message = FAULTS[fault]
    csrc = tmp_path / 'csrc'
    shutil.copytree(CSRC, csrc)
    source = (csrc / file).read_text(encoding='utf-8')
    assert source.count(right) == 1
    (csrc / file).write_text(source.replace(right, wrong), encoding='utf-8')
    result = run(kind, build(kind, 'baseline', tmp_path / 'build', csrc), 'baseline', 200, 'unchecked')
    assert result.returncode != 0 and message in result.stderr, result.stdout + result.stderr[-5000:]
