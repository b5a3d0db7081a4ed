"""Builds with CUDA where there is nvcc and no GPU: against the installed torch, also a CPU build of it."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
NO_NVCC = pytest.mark.skipif(shutil.which('nvcc') is None, reason='there is no nvcc')


@pytest.fixture(scope='module')
def report() -> ModuleType:
    """tools/kernel_report.py, by its path as ``make kernels`` runs it."""
    spec = importlib.util.spec_from_file_location('kernel_report', ROOT / 'tools' / 'kernel_report.py')
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope='module')
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a ``cuda_ops`` with a library of every kernel for one architecture, and what the compilers said.

    The C++ is not optimised here, which takes half of the time and is another library's: the one under all tests.
    """
    folder = tmp_path_factory.mktemp('built')
    package = Path(
        shutil.copytree(
            ROOT / 'cuda_ops',
            folder / 'cuda_ops',
            ignore=shutil.ignore_patterns('__pycache__', '_C.so*', '_build_info.json*'),
        )
    )
    script = f"""
import importlib.util, os, sys
from pathlib import Path
os.environ.update(FORCE_CUDA='1', TORCH_CUDA_ARCH_LIST='9.0')
spec = importlib.util.spec_from_file_location('cuda_ops_build', {str(package / '_build.py')!r})
build = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = build
spec.loader.exec_module(build)
build.CXX_FLAGS[build.CXX_FLAGS.index('-O3')] = '-O0'
build.build(Path({str(package)!r}), Path({str(folder / 'objects')!r}))
"""
    flags = f'{os.environ.get("NVCC_APPEND_FLAGS", "")} -Xptxas -v'
    result = subprocess.run(
        [sys.executable, '-c', script],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, 'NVCC_APPEND_FLAGS': flags},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return folder, result.stdout


@pytest.mark.slow
@NO_NVCC
@pytest.mark.skipif(torch.cuda.is_available(), reason='a GPU is here: tests/gpu tests the library itself')
def test_a_library_with_cuda_kernels_serves_the_cpu(built: tuple[Path, str]) -> None:
    folder, log = built
    assert 'CUDA kernels: yes: nvcc' in log and 'for 9.0 (TORCH_CUDA_ARCH_LIST)' in log
    use = """
import torch, cuda_ops
from cuda_ops import route_reference
status = cuda_ops.backend_status()
assert status.devices['cuda'].backend == 'compiled', status
x, delta, A = torch.randn(2, 5, 7, 6), torch.randn(2, 5, 7, 6), -torch.rand(6, 3)
B, C = torch.randn(2, 5, 7, 3), torch.randn(2, 5, 7, 3)
y = cuda_ops.line_scan(x, delta, A, B, C, axis='row')
grid = (x, delta[:, :, :, None], A[None], B[:, :, :, None, None], C[:, :, :, None, None], None, None)
torch.testing.assert_close(y, route_reference.route_scan(*grid, [0], True, True)[0])
print(status)
"""
    result = subprocess.run([sys.executable, '-c', use], cwd=folder, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert 'no such device here' in result.stdout and '9.0' in result.stdout


@pytest.mark.slow
@NO_NVCC
def test_kernels_keep_to_their_registers(built: tuple[Path, str], report: ModuleType) -> None:
    """What the assembler said of every kernel of the library, as ``make kernels`` has it for all architectures."""
    folder, log = built
    usages = report.parse(log)
    assert {usage.arch for usage in usages} == {'sm_90'}
    assert [usage for usage in usages if usage.spills] == []
    kernels = {usage.kernel for usage in usages}
    assert {
        'scan_forward<bfloat16, 1>',
        'scan_backward<float16, 16>',
        'segment_aggregates<float32, 8, 1>',
        'state_passing',
        'scan_backward_n1<bfloat16, 1>',
        'wavefront_forward<bfloat16, 16>',
        'wavefront_backward<float32, 4>',
    } <= kernels


@NO_NVCC
@pytest.mark.parametrize('count, spills', [(4, False), (400, True)])
def test_the_report_fails_for_a_kernel_that_spills(root: Path, tmp_path: Path, count: int, spills: bool) -> None:
    """The command line, with one small kernel in place of the package's own, which takes it seconds."""
    source = tmp_path / 'cuda_ops' / 'csrc' / 'cuda' / 'small.cu'
    source.parent.mkdir(parents=True)
    for name in ('tools/kernel_report.py', 'tools/children.py', 'cuda_ops/_build.py'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(root / name, tmp_path / name)
    index = '' if not spills else ' * x[0]'
    source.write_text(f"""
namespace cuda_ops {{
__global__ void small(float* x) {{
  float kept[{count}];
  for (int i = 0; i < {count}; ++i) kept[i] = x[i];
  for (int i = 0; i < {count}; ++i) x[i] = kept[(int)(i{index}) % {count}];
}}
}}  // namespace cuda_ops
""")
    result = subprocess.run(
        [sys.executable, str(tmp_path / 'tools' / 'kernel_report.py'), '--archs', '9.0'],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert re.search(r'^\| small \| \d+ \|', result.stdout, re.MULTILINE), result.stdout + result.stderr
    assert (result.returncode, f'1 kernels compiled, {int(spills)} spill' in result.stdout) == (int(spills), True)
    assert ('error: small on sm_90 has a stack of' in result.stderr) == spills


@NO_NVCC
def test_the_compiler_at_hand_works_and_knows_its_architectures(build: ModuleType) -> None:
    toolkit = build.find_toolkit()
    assert toolkit is not None and toolkit.obstacle == ''
    known = set(build.default_archs(toolkit).removesuffix('+PTX').split(';'))
    assert {'8.0', '9.0'} <= known <= set(build.ARCHS)
    assert ('12.0' in known) == (tuple(map(int, toolkit.version.split('.'))) >= (12, 8))


@NO_NVCC
@pytest.mark.parametrize(
    ('archs', 'message'),
    [
        ('8.0 99.0', r'nvcc .* does not compile for 99\.0 \(--archs\), only for .*8\.0, .*; install a newer toolkit'),
        ('8.0 sm_90', "--archs has the entry 'sm_90'"),
    ],
)
def test_the_report_refuses_what_the_compiler_does_not_know(root: Path, archs: str, message: str) -> None:
    result = subprocess.run(
        [sys.executable, str(root / 'tools' / 'kernel_report.py'), '--archs', archs],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 2 and re.match(f'error: {message}', result.stderr), result.stderr


def test_spills_are_read_from_the_compilers_report(report: ModuleType) -> None:
    symbol = '_ZN8cuda_ops5_anon12scan_forwardI13__nv_bfloat16Li16EEEvNS0_14RouteArgumentsE'
    log = f"""ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '{symbol}' for 'sm_90'
ptxas info    : Function properties for {symbol}
    24 bytes stack frame, 20 bytes spill stores, 36 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 24 bytes cumulative stack size, 512 bytes smem
"""
    (usage,) = report.parse(log)
    assert usage == report.Usage('scan_forward<bfloat16, 16>', 'sm_90', 168, 512, 24, 20, 36) and usage.spills
    assert not report.parse(
        log.replace('24 bytes stack', '0 bytes stack').replace('20 b', '0 b').replace('36 b', '0 b')
    )[0].spills
    with pytest.raises(ValueError, match='no report'):
        report.parse('nothing')
