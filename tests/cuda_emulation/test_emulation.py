"""The emulation of CUDA finds what it is there to find: each planted fault shows."""

import os
import subprocess
from pathlib import Path

import pytest
import torch

from tests.cuda_emulation.emulate import FOLDER, SANITIZERS, compile_for_cpu, compiler

pytestmark = pytest.mark.skipif(compiler() is None, reason='the emulation is compiled by g++, which is not there')
SEEDS = range(3)


@pytest.fixture(scope='module')
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp('faults') / 'faults'
    compile_for_cpu([FOLDER / 'faults' / 'kernels.cu'], path, [*SANITIZERS])
    return path


def run(program: Path, kernel: str, seed: int, residents: int = 2) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(program), kernel, str(seed), str(residents)],
        capture_output=True,
        text=True,
        env=os.environ | {'ASAN_OPTIONS': 'detect_leaks=0'},
    )


@pytest.mark.parametrize('seed', SEEDS)
def test_a_kernel_without_fault_is_right(program: Path, seed: int) -> None:
    result = run(program, 'reverse', seed)
    assert (result.returncode, result.stdout) == (0, '0 wrong\n'), result.stderr


@pytest.mark.parametrize('seed', SEEDS)
@pytest.mark.parametrize('kernel', ('without_barrier', 'without_second_barrier', 'uninitialised'))
def test_missing_barriers_and_uninitialised_memory_give_wrong_results(program: Path, kernel: str, seed: int) -> None:
    result = run(program, kernel, seed)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.split()[0]) > 0


@pytest.mark.parametrize('kernel', ('beyond_shared', 'beyond_target'))
def test_accesses_out_of_bounds_are_reported(program: Path, kernel: str) -> None:
    result = run(program, kernel, 0)
    assert result.returncode != 0 and 'heap-buffer-overflow' in result.stderr
    assert kernel in result.stderr


@pytest.mark.parametrize(
    ('kernel', 'message'),
    [
        ('divergent', 'divergent barrier in block 0 of 1'),
        ('lane_missing', 'lanes have ended that others of their warp wait'),
    ],
)
def test_threads_that_wait_for_ever_are_reported(program: Path, kernel: str, message: str) -> None:
    result = run(program, kernel, 0)
    assert result.returncode == 1 and message in result.stdout, result.stderr


@pytest.mark.parametrize('seed', SEEDS)
@pytest.mark.parametrize(
    ('kernel', 'residents'), [('waits_by_number', 2), ('waits_by_ticket', 2), ('waits_by_ticket', 1)]
)
def test_blocks_that_wait_for_each_other_are_right(program: Path, kernel: str, residents: int, seed: int) -> None:
    result = run(program, kernel, seed, residents)
    assert (result.returncode, result.stdout) == (0, '0 wrong\n'), result.stdout + result.stderr


@pytest.mark.parametrize('kernel', ('overtakes', 'does_not_wait', 'waits_for_too_few', 'publishes_too_early'))
def test_warps_and_blocks_that_do_not_wait_for_each_other_give_wrong_results(program: Path, kernel: str) -> None:
    """Many orders show it; others happen to be right."""
    results = [run(program, kernel, seed) for seed in range(12)]
    assert all(result.returncode == 0 for result in results), results
    assert sum(int(result.stdout.split()[0]) > 0 for result in results) >= 4, results


def test_blocks_that_wait_for_ever_are_reported(program: Path) -> None:
    """With one resident block and an odd seed, the reader comes first."""
    result = run(program, 'waits_by_number', 1, residents=1)
    assert result.returncode == 1
    assert 'deadlock in block 1 of 2: all of the 1 blocks that are resident poll' in result.stdout


def test_half_precision_is_torchs(tmp_path: Path) -> None:
    """Every 16-bit value, and a float32 between each two of them, as torch converts them."""
    source = tmp_path / 'convert.cpp'
    source.write_text("""
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cstdio>
int main(int argc, char**) {
  float value;
  while (std::fread(&value, 4, 1, stdin)) {
    const uint16_t bits = argc > 1 ? __float2half_rn(value).bits : __float2bfloat16_rn(value).bits;
    const float back = argc > 1 ? __half2float({bits}) : __bfloat162float({bits});
    std::fwrite(&back, 4, 1, stdout);
  }
}
""")
    compile_for_cpu([source], tmp_path / 'convert', [])
    for dtype, arguments in ((torch.float16, ['half']), (torch.bfloat16, [])):
        exact = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).float()
        exact = exact[exact.isfinite()].sort().values
        values = torch.cat(
            [
                exact,
                (exact[1:].double() + exact[:-1]).div(2).float(),
                torch.nextafter(exact, torch.tensor(float('inf'))),
                torch.tensor([1e6, -3e38, float('inf')]),
            ]
        )
        output = subprocess.run(
            [str(tmp_path / 'convert'), *arguments], input=values.numpy().tobytes(), capture_output=True, check=True
        ).stdout
        got = torch.frombuffer(bytearray(output), dtype=torch.float32)
        assert torch.equal(got, values.to(dtype).float()), dtype


def test_arithmetic_of_the_kernels(tmp_path: Path) -> None:
    compile_for_cpu([FOLDER / 'arithmetic.cu'], tmp_path / 'arithmetic', ['-O2'])
    wrong_quotients, *errors = subprocess.run(
        [tmp_path / 'arithmetic'], capture_output=True, text=True, check=True
    ).stdout.split()
    assert wrong_quotients == '0'
    # 2^-22 of the polynomial, and what rounding its terms adds.
    assert all(float(error) < 8 for error in errors), errors
