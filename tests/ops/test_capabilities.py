"""Every instruction set the kernels are compiled for, each in a process of its own, since the choice is made once."""

import os
import platform
import re
import subprocess
import sys

import pytest
import torch

from cuda_ops import _library
from tests.ops.helpers import ROOT, run_python

# The names of torch's own detection, from the least to the most able.
TORCH_NAMES = {'baseline': 'DEFAULT', 'avx2': 'AVX2', 'avx512': 'AVX512'}
FILES = ('test_route_scans.py', 'test_values.py', 'test_wavefront_scan.py')


def able(capability: str) -> bool:
    """Whether the processor has an instruction set, by torch's reckoning, which is not the library's."""
    order = list(TORCH_NAMES.values())
    found = torch.backends.cpu.get_cpu_capability()
    return found in order and order.index(found) >= order.index(TORCH_NAMES[capability])


# All types go through the same code; test_values.py has the conversions of each.
SAMPLE = 'test_values or not float64 and (bfloat16 or not float16)'


@pytest.mark.parametrize(
    ('capability', 'chosen'),
    (
        pytest.param('baseline', '', marks=pytest.mark.slow),
        pytest.param('avx2', '', marks=pytest.mark.slow),
        ('avx2', SAMPLE),
    ),
    ids=('baseline', 'avx2', 'sample of avx2'),
)
def test_capability_passes_the_tests(capability: str, chosen: str) -> None:
    if capability != 'baseline' and platform.machine() not in ('x86_64', 'AMD64'):
        pytest.skip(f'{capability} is an instruction set of x86-64, this is {platform.machine()}')
    if capability != 'baseline' and not able(capability):
        pytest.skip(f'this processor lacks {capability}')
    if chosen and _library.cpu_capability() == capability:
        pytest.skip(f'{capability} is what all other tests run on this processor')
    # Scratch memory that is read before it is written holds huge values under MALLOC_PERTURB_.
    environ = os.environ | {'SSM_OPS_CPU_CAPABILITY': capability, 'MALLOC_PERTURB_': '128'}
    files = [str(ROOT / 'tests' / 'ops' / name) for name in FILES]
    result = subprocess.run(
        [sys.executable, '-m', 'pytest', '-p', 'no:cacheprovider', '--tb=short', '-k', chosen, *files],
        cwd=ROOT,
        env=environ,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert f'cuda_ops: {capability} kernels' in result.stdout
    passed = re.search(r'(\d+) passed', result.stdout)
    assert passed and int(passed.group(1)) > 100 and 'skipped' not in result.stdout, result.stdout[-500:]


@pytest.mark.skipif(platform.machine() not in ('x86_64', 'AMD64'), reason='there is one instruction set to choose from')
def test_an_unknown_capability_is_refused() -> None:
    result = run_python('from cuda_ops import _library; _library.cpu_capability()', SSM_OPS_CPU_CAPABILITY='sse')
    assert "SSM_OPS_CPU_CAPABILITY is 'sse'; it must be baseline, avx2 or avx512" in result.stderr, result.stdout


def test_the_most_able_kernels_are_chosen() -> None:
    if 'SSM_OPS_CPU_CAPABILITY' in os.environ or 'ATEN_CPU_CAPABILITY' in os.environ:
        pytest.skip('the choice is capped from outside')
    best = [name for name in TORCH_NAMES if able(name)][-1] if platform.machine() in ('x86_64', 'AMD64') else 'baseline'
    assert _library.cpu_capability() == best
