"""The operators, run from what nvcc made of the kernels, hold against the float64 loops."""

import re
from collections.abc import Callable
from zlib import crc32

import pytest
import torch

import cuda_ops
from cuda_ops import _library
from tests.cuda_emulation.emulate import CSRC, compiler
from tests.ops.helpers import check_against_loop, dtype_name
from tests.ops.route_cases import Case, Cross, Factors, Lines, Sequence, case_id, check
from tests.ops.wavefront_cases import PARAMETERS as WAVEFRONT_PARAMETERS
from tests.ops.wavefront_cases import Wavefront, loop
from tests.ptx import prove
from tests.ptx.interpret import Interpreter, compile_ptx, kernel_report, read_ptx, toolkit

pytestmark = [
    pytest.mark.skipif(compiler() is None, reason='the interpreter is compiled by g++, which is not there'),
    pytest.mark.skipif(toolkit() is None, reason='the kernels are compiled by nvcc, which is not there'),
    pytest.mark.skipif(not _library.STATUS.compiled, reason='the ops are not compiled'),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Two strips of two tiles of channels, one strip, and more tiles than add to the same sums.
WAVEFRONTS = (
    *(Wavefront(1, 11, 9, 18, states, reverse=states % 4 == 0) for states in (1, 2, 4, 8, 16, 3, 10)),
    Wavefront(2, 3, 5, 70, 2, reverse=True, D=False),
)
# Two segments and one, along rows and columns in both directions, every number of states; shared memory such that a map
# of one state is divided.
WHOLE = 227 * 1024
ROUTES = (
    *((Cross(1, 7, 11, 5, states), WHOLE) for states in (1, 2, 4, 8, 16, 3)),
    (Cross(2, 3, 5, 33, 2, D=False, bias=False, softplus=False), WHOLE),
    *((Lines(1, 3, 9, 5, states, 'column', reverse=states > 2), WHOLE) for states in (1, 2, 4, 8, 16, 11)),
    (Lines(1, 3, 9, 35, 4, 'row', B=False, C=False), WHOLE),
    (Sequence(1, 6, 40, 3, B=3, C=1, z=True), WHOLE),
    (Cross(1, 9, 7, 18, 1), WHOLE),
    (Factors(1, 9, 7, 18, 1, rank=6), WHOLE),
    (Sequence(1, 8, 70, 1, B=2, C=0), WHOLE),
    (Cross(1, 25, 27, 4, 1), 48 * 1024),
    (Factors(1, 25, 27, 4, 1, rank=2), 48 * 1024),
)


@pytest.fixture(scope='module')
def few(tmp_path_factory: pytest.TempPathFactory) -> Interpreter:
    return Interpreter(tmp_path_factory.mktemp('few'), few=True)


@pytest.fixture(scope='module')
def every(tmp_path_factory: pytest.TempPathFactory) -> Interpreter:
    return Interpreter(tmp_path_factory.mktemp('every'))


def check_wavefront(case: Wavefront, dtype: torch.dtype) -> None:
    check_against_loop(
        cuda_ops.wavefront_scan, loop, case.inputs(), case.options(), WAVEFRONT_PARAMETERS, dtype, cuda=True
    )


@pytest.mark.parametrize('seed', range(3))
def test_a_small_wavefront_scan_equals_the_loop(few: Interpreter, nan_in_fresh_memory: None, seed: int) -> None:
    with few.interpret(seed=seed, residents=1 + seed):
        check_wavefront(Wavefront(1, 11, 7, 18, 4), torch.bfloat16)
    assert few.launched == ['wavefront_forward<bfloat16, 4>', 'wavefront_backward<bfloat16, 4>']


@pytest.mark.parametrize(
    ('pattern', 'replacement'),
    (
        (r'st\.release\.gpu', 'st.relaxed.gpu'),
        (r'ld\.acquire\.gpu', 'ld.relaxed.gpu'),
        (r'ld\.acquire\.gpu\.global\.s64\s+(%rd\d+), \[[^]]*\];', f'mov.u64 \\1, {2**63 - 1};'),
    ),
    ids=('relaxed release', 'relaxed acquire', 'no wait'),
)
def test_flags_that_order_nothing_are_found(few: Interpreter, pattern: str, replacement: str) -> None:
    with few.interpret(edit=lambda text: re.sub(pattern, replacement, text)):
        with pytest.raises(RuntimeError, match=r'race in global memory.*boundary|race in global memory.*wavefront'):
            check_wavefront(Wavefront(1, 11, 7, 18, 4), torch.bfloat16)


def without_barrier(kernel: str, number: int) -> Callable[[str], str]:
    """Leaves out one of a kernel's barriers."""

    def edit(text: str) -> str:
        symbols = {kernel_report().readable_name(symbol): symbol for symbol in read_ptx(text).kernels}
        return list(prove.without_barriers(text, symbols[kernel]))[number] if kernel in symbols else text

    return edit


def test_a_missing_barrier_is_found(few: Interpreter) -> None:
    with few.interpret(edit=without_barrier('wavefront_forward<bfloat16, 4>', 5)):
        with pytest.raises(RuntimeError, match=r'race in .* memory'):
            check_wavefront(Wavefront(1, 11, 7, 18, 4), torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize('dtype', DTYPES, ids=dtype_name)
def test_every_kernel_equals_the_loop(every: Interpreter, nan_in_fresh_memory: None, dtype: torch.dtype) -> None:
    launched: set[str] = set()
    for wavefront in WAVEFRONTS:
        seed = crc32(f'{wavefront} {dtype}'.encode())
        with every.interpret(seed=seed, residents=1 + seed % 3):
            check_wavefront(wavefront, dtype)
            launched |= set(every.launched)
    for case, limit in ROUTES:
        seed = crc32(f'{case_id(case)} {dtype}'.encode())
        with every.interpret(seed=seed, residents=1 + seed % 3, shared_limit=limit):
            check(case, dtype, cuda=True)
            launched |= set(every.launched)
    name = kernel_report().readable_name
    compiled = {
        name(symbol) for source in (CSRC / 'cuda').glob('*.cu') for symbol in read_ptx(compile_ptx(source)).kernels
    }
    expected = {kernel for kernel in compiled if f'<{dtype_name(dtype)},' in kernel or kernel == 'state_passing'}
    assert not expected - launched, f'no case launches {sorted(expected - launched)}'


# Several strips, tiles, chunks, warps and segments; and how many barriers of which kernels these launches do not need.
# wavefront_*: every step of a work item ends with a barrier, so that those before an item is fetched and around the
# staging of A order nothing more; with this much shared memory no step is recomputed before a span.
# scan_backward: a barrier follows the last use of a chunk's projections, and another one the staging of the next.
# *_n1: a warp has one chunk, and no use for a barrier before the next; the sums of parameters are behind other
# barriers, too.
BARRIERS = (
    (Wavefront(1, 11, 9, 18, 2), WHOLE, {'wavefront_forward': 3, 'wavefront_backward': 4}),
    (Cross(1, 7, 11, 5, 2), WHOLE, {'scan_backward': 1}),
    (Cross(1, 9, 7, 18, 1), WHOLE, {'scan_forward_n1': 1, 'scan_backward_n1': 2}),
)


@pytest.mark.slow
@pytest.mark.parametrize(('case', 'limit', 'unneeded'), BARRIERS, ids=str)
def test_each_missing_barrier_is_found(
    every: Interpreter, case: Case | Wavefront, limit: int, unneeded: dict[str, int]
) -> None:
    counts: dict[str, int] = {}

    def count(text: str) -> str:
        for symbol in read_ptx(text).kernels:
            counts[kernel_report().readable_name(symbol)] = len(list(prove.without_barriers(text, symbol)))
        return text

    def run(edit: Callable[[str], str]) -> None:
        with every.interpret(edit=edit, shared_limit=limit):
            if isinstance(case, Wavefront):
                check_wavefront(case, torch.float32)
            else:
                check(case, torch.float32, cuda=True)

    run(count)
    for kernel in set(every.launched):
        missed = 0
        for number in range(counts[kernel]):
            try:
                run(without_barrier(kernel, number))
                missed += 1
            except RuntimeError as error:
                assert 'FaultFound' in str(error)
        assert missed == unneeded.get(kernel.partition('<')[0], 0), kernel
