"""The CUDA kernels themselves, run on the CPU: every pass, dtype, number of states and route, at awkward sizes."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import cuda_ops
from cuda_ops import _library, route_scan
from cuda_ops.wavefront_scan import _checkpoints_shape
from ssm_backbones.layers.ss2d import SS2D
from tests.cuda_emulation.emulate import SANITIZE_VARIABLE, WITHOUT_FLOAT16, Emulation, compiler
from tests.ops.helpers import ROOT, check_against_loop, differentiate, dtype_name, rounded
from tests.ops.route_cases import CASES as ROUTE_CASES
from tests.ops.route_cases import PARAMETERS, Case, Cross, Factors, LineFactors, Lines, Sequence, case_id, check
from tests.ops.wavefront_cases import CASES as WAVEFRONT_CASES
from tests.ops.wavefront_cases import PARAMETERS as WAVEFRONT_PARAMETERS
from tests.ops.wavefront_cases import Wavefront, loop

pytestmark = [
    pytest.mark.skipif(compiler() is None, reason='the emulation is compiled by g++, which is not there'),
    pytest.mark.skipif(not _library.STATUS.compiled, reason='the ops are not compiled'),
]

# Both 16-bit types go through the same code, by other conversions.
HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow))
# Several segments along each route, lines that end within them, several tiles of channels, blocks of several warps.
LONG = (
    Cross(1, 17, 23, 40, 1),
    Cross(1, 17, 23, 41, 1),
    Cross(1, 27, 31, 6, 1),
    Factors(1, 17, 23, 40, 1, rank=10),
    Cross(2, 9, 31, 5, 16),
    Cross(1, 20, 13, 300, 2),
    Cross(1, 10, 14, 33, 11),
    Sequence(2, 36, 700, 1, B=2, C=2),
    Lines(2, 3, 200, 35, 4, 'row', reverse=True),
    Sequence(1, 70, 260, 8, B=2, C=1, z=True),
    Sequence(1, 12, 300, 3, B=3, C=3),
)
# Several strips and tiles of channels, also more of these than add up their sums.
WIDE = (
    Wavefront(1, 19, 30, 40, 16),
    Wavefront(2, 33, 17, 20, 10, reverse=True),
    Wavefront(1, 9, 50, 17, 8),
    Wavefront(1, 24, 26, 16, 4, reverse=True),
    Wavefront(2, 17, 11, 100, 2),
    Wavefront(1, 10, 9, 70, 16, reverse=True),
)


@pytest.fixture(scope='session')
def emulation(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Emulation:
    # A third of the compilation serves slow tests alone.
    names = [item.name for item in request.session.items if item.path == Path(__file__)]
    needed = any(re.search(r'\bfloat16\b', name) for name in names)
    return Emulation(tmp_path_factory.mktemp('emulation'), () if needed else WITHOUT_FLOAT16)


def in_dtypes(cases: tuple[Any, ...], large: tuple[Any, ...], name: Callable[[Any], str]) -> list[Any]:
    """Parameters (case, dtype): float32 is the sample of large cases."""
    slow = {(case, dtype) for case in large for dtype in HALVES} | {(case, torch.float16) for case in cases}
    return [
        pytest.param(
            case,
            dtype,
            id=f'{name(case)}-{dtype_name(dtype)}',
            marks=[pytest.mark.slow] if (case, dtype) in slow else [],
        )
        for dtype in (torch.float32, *HALVES)
        for case in (*cases, *large)
    ]


@pytest.mark.parametrize(('case', 'dtype'), in_dtypes(ROUTE_CASES, LONG, case_id))
def test_route_scans_equal_the_loop(
    emulation: Emulation, nan_in_fresh_memory: None, case: Case, dtype: torch.dtype
) -> None:
    with emulation.serve(seed=crc32(f'{case_id(case)} {dtype}'.encode())):
        check(case, dtype, cuda=True)
        assert emulation.launches or case.batch == 0


@pytest.mark.parametrize(('case', 'dtype'), in_dtypes(WAVEFRONT_CASES, WIDE, str))
def test_wavefront_scan_equals_the_loop(
    emulation: Emulation, nan_in_fresh_memory: None, case: Wavefront, dtype: torch.dtype
) -> None:
    with emulation.serve(seed=crc32(f'{case} {dtype}'.encode())):
        check_against_loop(
            cuda_ops.wavefront_scan, loop, case.inputs(), case.options(), WAVEFRONT_PARAMETERS, dtype, cuda=True
        )
        assert emulation.launches or case.batch == 0


@pytest.mark.parametrize(
    'case',
    (
        Cross(2, 17, 23, 40, 1),
        Cross(1, 17, 23, 41, 1),
        Factors(1, 17, 23, 40, 1),
        Lines(1, 7, 90, 65, 4, 'column'),
        Wavefront(1, 19, 11, 40, 16),
    ),
    ids=str,
)
def test_results_do_not_depend_on_the_order_of_threads(emulation: Emulation, case: Case | Wavefront) -> None:
    wavefront = isinstance(case, Wavefront)
    function = cuda_ops.wavefront_scan if wavefront else case.function
    inputs = rounded(case.inputs(), WAVEFRONT_PARAMETERS if wavefront else PARAMETERS, torch.bfloat16)
    weights, first = None, {}
    for seed in range(4):
        with emulation.serve(seed=seed):
            results, weights = differentiate(function, inputs, case.options(), weights)
        first = first or results
        for name, value in results.items():
            assert torch.equal(value, first[name]), f'{name} with seed {seed}'


@pytest.mark.slow
def test_kernels_fit_into_the_shared_memory_of_older_gpus(emulation: Emulation) -> None:
    for limit in (48 * 1024, 64 * 1024, 99 * 1024):
        with emulation.serve(shared_limit=limit):
            for case in (Cross(1, 9, 15, 130, 16), Cross(1, 9, 15, 130, 11), Lines(1, 3, 90, 70, 8, 'row')):
                check(case, torch.float32, cuda=True)
            # Keeps 1, 2 and 4 of the 8 steps from one checkpointed wavefront to the next.
            case = Wavefront(1, 17, 20, 18, 16)
            check_against_loop(
                cuda_ops.wavefront_scan,
                loop,
                case.inputs(),
                case.options(),
                WAVEFRONT_PARAMETERS,
                torch.float32,
                cuda=True,
            )


@pytest.mark.parametrize('states,segments,tiles', ((1, 8, 2), (2, 64, 1)))
def test_a_long_route_of_one_image_is_divided(emulation: Emulation, states: int, segments: int, tiles: int) -> None:
    case = Cross(1, 64, 64, 32, states)
    with emulation.serve(), torch.no_grad():
        case.function(**rounded(case.inputs(), PARAMETERS, torch.float32), **case.options())
        # For each axis a summary and a scan of all segments, and one combination for all routes.
        assert emulation.launches == 5
        assert emulation.blocks == 4 * segments * tiles + 4 * states


def test_a_map_with_one_state_is_one_launch_where_it_fits(emulation: Emulation) -> None:
    case = Cross(2, 56, 56, 32, 1)
    with emulation.serve(), torch.no_grad():
        case.function(**rounded(case.inputs(), PARAMETERS, torch.bfloat16), **case.options())
        assert emulation.launches == 1 and emulation.blocks == 2 * 2


@pytest.mark.parametrize('dtype', DTYPES, ids=dtype_name)
@pytest.mark.parametrize(
    'case',
    (
        Cross(2, 33, 41, 18, 1),
        Factors(1, 33, 41, 18, 1, rank=6),
        Factors(1, 33, 41, 4, 1, rank=16),
        Sequence(1, 8, 1600, 1, B=2),
        Sequence(1, 4, 1024, 1, C=0),
    ),
    ids=case_id,
)
def test_maps_with_one_state_that_do_not_fit_fall_into_segments(
    emulation: Emulation, case: Case, dtype: torch.dtype
) -> None:
    with emulation.serve(seed=5, shared_limit=48 * 1024):
        check(case, dtype, cuda=True)
        assert emulation.launches > 5


@pytest.mark.parametrize(
    ('case', 'taken'),
    (
        (Factors(1, 5, 7, 18, 1, rank=2), True),
        (Factors(1, 5, 7, 18, 1, rank=8), True),
        # Possible, and by count no gain.
        (Factors(1, 5, 7, 18, 1, rank=12), False),
        (Factors(1, 5, 7, 18, 1, rank=16), False),
        (Factors(1, 5, 7, 18, 1, rank=5), False),
        (Factors(1, 5, 7, 18, 1, rank=18), False),
        (Factors(1, 5, 7, 17, 1, rank=6), False),
        (Factors(1, 5, 7, 18, 2, rank=6), False),
        (LineFactors(1, 5, 8, 18, 1, 'row', rank=6), False),
    ),
    ids=str,
)
def test_delta_is_not_stored_where_the_scan_computes_it(
    emulation: Emulation, case: Factors | LineFactors, taken: bool
) -> None:
    inputs = rounded(case.inputs(), PARAMETERS, torch.bfloat16)
    with emulation.serve(), profile(activities=[ProfilerActivity.CPU]) as record:
        per_line = isinstance(case, LineFactors)
        assert route_scan._takes_low_rank(inputs['x'], case.states, case.rank, per_line) == taken
        results, _ = differentiate(case.function, inputs, case.options())
    # Two products make the gradients of dt and weight.
    products = sum(event.count for event in record.key_averages() if event.key == 'aten::bmm')
    assert products == (2 if taken else 3)
    assert results['grad delta'].shape == inputs['delta'].shape


def test_factors_in_any_layout_give_the_same(emulation: Emulation) -> None:
    """Those that the kernels cannot read as pairs are multiplied first."""
    case = Factors(1, 9, 8, 18, 1, rank=6)
    inputs = rounded(case.inputs(), PARAMETERS, torch.float32)
    with emulation.serve():
        expected, weights = differentiate(case.function, inputs, case.options())
        delta = inputs['delta']
        # As SS2D has them: a part of each route's projections.
        within = torch.cat([delta, torch.randn(1, 9, 8, 4, 2)], -1)[..., :6]
        apart = delta.permute(3, 0, 1, 2, 4).contiguous().permute(1, 2, 3, 0, 4)
        odd = torch.cat([torch.randn(1, 9, 8, 4, 1), delta], -1)[..., 1:]
        for arranged in (within, apart, odd, delta.mT.contiguous().mT):
            got, _ = differentiate(case.function, inputs | {'delta': arranged}, case.options(), weights)
            for name, value in expected.items():
                torch.testing.assert_close(
                    got[name], value, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f'{name}: {text}'
                )


@pytest.mark.parametrize('gate', (False, True))
def test_ss2d_is_the_same_with_step_sizes_made_in_the_scan(
    emulation: Emulation, monkeypatch: pytest.MonkeyPatch, gate: bool
) -> None:
    layer = SS2D(12, inner_channels=24, d_state=1, dt_rank=6, gate=gate)
    x = torch.randn(2, 7, 5, 12, requires_grad=True)

    def run() -> tuple[list[Tensor], int]:
        with emulation.serve(), profile(activities=[ProfilerActivity.CPU]) as record:
            y = layer(x)
        products = sum(event.count for event in record.key_averages() if event.key == 'aten::bmm')
        with emulation.serve():
            return [y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])], products

    results, products = run()
    monkeypatch.setattr(route_scan, '_takes_low_rank', lambda *given: False)
    expected, one_more = run()
    assert (products, one_more) == (0, 1)
    for got, value in zip(results, expected, strict=True):
        torch.testing.assert_close(got, value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('size,limit', (((7, 7), 227), ((29, 43), 48)), ids=('whole', 'segments'))
@pytest.mark.parametrize('name,value', (('delta', -6.0), ('x', torch.inf), ('B', torch.nan), ('delta', torch.inf)))
def test_what_grows_at_the_last_pixel_goes_no_further_than_on_the_cpu(
    emulation: Emulation, size: tuple[int, int], limit: int, name: str, value: float
) -> None:
    """Chunks have positions that are not on the map, and hold the last one's values there."""
    inputs = rounded(Cross(1, *size, 8, 1, softplus=False).inputs(), PARAMETERS, torch.float32)
    tensor = inputs[name]
    assert tensor is not None and inputs['A'] is not None
    inputs['A'].fill_(-1)
    tensor[0, -1, -1, ..., :3] = value
    expected, weights = differentiate(cuda_ops.cross_selective_scan, inputs, {'delta_softplus': False})
    with emulation.serve(shared_limit=limit * 1024):
        results, _ = differentiate(cuda_ops.cross_selective_scan, inputs, {'delta_softplus': False}, weights)
    for part, result in results.items():
        finite = expected[part].isfinite()
        assert torch.equal(result.isfinite(), finite), part
        torch.testing.assert_close(result[finite], expected[part][finite], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('row,column', ((0, 0), (0, 5), (6, 0), (7, 9), (18, 18)))
@pytest.mark.parametrize(
    'name,value',
    (
        ('x', torch.inf),
        ('delta_top', torch.inf),
        ('delta_left', torch.nan),
        ('delta_left', -200.0),
        ('B_top', torch.nan),
        ('C', torch.inf),
    ),
)
def test_what_is_not_finite_goes_no_further_than_on_the_cpu(
    emulation: Emulation, nan_in_fresh_memory: None, name: str, value: float, row: int, column: int
) -> None:
    """Neither through neighbours that a pixel does not take, nor through states that fill up a group."""
    for size, states in (((19, 21), 16), ((21, 19), 3)):  # where other neighbours are those above, for the kernels
        inputs = rounded(Wavefront(1, *size, 17, states).inputs(), WAVEFRONT_PARAMETERS, torch.float32)
        tensor = inputs[name]
        assert tensor is not None and inputs['A_left'] is not None
        tensor[0, row, column, 2] = value
        inputs['A_left'].mul_(1e-2)  # a step of -200 lets states grow, but not beyond all bounds
        expected, weights = differentiate(cuda_ops.wavefront_scan, inputs, {})
        with emulation.serve():
            results, _ = differentiate(cuda_ops.wavefront_scan, inputs, {}, weights)
        for part, result in results.items():
            finite = expected[part].isfinite()
            assert torch.equal(result.isfinite(), finite), part
            torch.testing.assert_close(result[finite], expected[part][finite], rtol=1e-3, atol=1e-3)


def test_a_map_is_one_launch_of_as_many_blocks_as_are_of_use(emulation: Emulation) -> None:
    case = Wavefront(2, 40, 30, 40, 8)
    inputs = rounded(case.inputs(), WAVEFRONT_PARAMETERS, torch.float32)
    # Five strips of two images' three tiles of channels.
    for multiprocessors, blocks in ((132, 5 * 2 * 3), (4, 4)):
        with emulation.serve(multiprocessors=multiprocessors):
            cuda_ops.wavefront_scan(**inputs)
            assert emulation.launches == 1 and emulation.blocks == blocks


@pytest.mark.parametrize('chunk', (1, 5, 9, 16))
@pytest.mark.parametrize('case', (Wavefront(1, 21, 30, 20, 4), Wavefront(2, 37, 18, 17, 3, reverse=True)), ids=str)
def test_strips_of_any_number_of_rows(
    emulation: Emulation, nan_in_fresh_memory: None, case: Wavefront, chunk: int
) -> None:
    inputs = list(rounded(case.inputs(), WAVEFRONT_PARAMETERS, torch.float32).values())
    shapes: list[torch.Size] = []

    def results() -> list[Tensor]:
        y, *saved = torch.ops.cuda_ops.wavefront_scan(*inputs, case.reverse, chunk)
        shapes.append(saved[1].shape)
        return [y, saved[0], *torch.ops.cuda_ops.wavefront_scan_backward(y, *inputs, *saved, case.reverse, chunk)]

    expected = results()
    with emulation.serve():
        for result, value in zip(results(), expected, strict=True):
            torch.testing.assert_close(result, value, rtol=1e-3, atol=1e-3)
    # What torch.compile is told of the states that a GPU saves.
    assert shapes == [(0,), _checkpoints_shape(inputs[0], case.states, chunk)]


@pytest.mark.parametrize(
    'case',
    (Wavefront(1, 75, 21, 20, 2), Wavefront(2, 17, 40, 17, 10, reverse=True), Wavefront(1, 18, 9, 70, 3)),
    ids=str,
)
def test_strips_give_the_same_bits_whichever_blocks_take_them(
    emulation: Emulation, nan_in_fresh_memory: None, case: Wavefront
) -> None:
    """One block for all strips, blocks that follow each other, that share the strips, and one for each, all at once."""
    inputs = rounded(case.inputs(), WAVEFRONT_PARAMETERS, torch.bfloat16)
    weights, first = None, {}
    for seed, (multiprocessors, residents) in enumerate(((1, 1), (132, 1), (2, 2), (132, 2), (3, 3), (132, 100))):
        with emulation.serve(seed=seed, multiprocessors=multiprocessors, residents=residents):
            results, weights = differentiate(cuda_ops.wavefront_scan, inputs, case.options(), weights)
            with torch.no_grad():  # saves no states, and hands them over elsewhere
                results['without gradients'] = cuda_ops.wavefront_scan(**inputs, **case.options())
        first = first or results
        assert torch.equal(results['without gradients'], first['output0'])
        for name, value in results.items():
            assert torch.equal(value, first[name]), f'{name} with {multiprocessors} blocks, {residents} at a time'


@pytest.mark.slow
def test_more_blocks_than_a_grid_takes_are_divided_among_launches(tmp_path: Path) -> None:
    few = Emulation(tmp_path, ['-DSSM_MAX_BLOCKS=3'])
    with few.serve():
        check(Cross(2, 9, 15, 40, 1), torch.float32, cuda=True)
        check(Cross(2, 9, 15, 41, 1), torch.float32, cuda=True)
        assert few.launches > few.blocks / 4


@pytest.mark.parametrize('launch', range(5))
@pytest.mark.parametrize('channels', (15, 16))
def test_a_failed_launch_raises(emulation: Emulation, channels: int, launch: int) -> None:
    case = Cross(1, 30, 30, channels, 1)
    inputs = rounded(case.inputs(), PARAMETERS, torch.float32)
    with emulation.serve(fail_launch=launch, shared_limit=48 * 1024), torch.no_grad():
        with pytest.raises(RuntimeError, match='cuda_ops::route_scan: CUDA error 719: the launch was made to fail'):
            case.function(**inputs)
        case.function(**inputs)


def test_what_has_no_kernel_is_refused(emulation: Emulation) -> None:
    case = Cross(1, 3, 3, 4, 1)
    with emulation.serve():
        # The public functions look at tensors on a GPU; these are on the CPU, and the operator refuses them.
        with pytest.raises(ValueError, match='float64'):
            case.function(**case.inputs())
        x, delta, A = torch.randn(1, 150, 150, 4), torch.randn(1, 150, 150, 2, 4), -torch.rand(2, 4, 1)
        with pytest.raises(RuntimeError, match='pass a smaller chunk'):
            torch.ops.cuda_ops.route_scan(x, delta, A, None, None, None, None, [0, 2], False, True, 20000)


@pytest.mark.slow
@pytest.mark.skipif(SANITIZE_VARIABLE in os.environ, reason='these are the sanitized tests')
def test_sanitizers_find_nothing(pytestconfig: pytest.Config) -> None:
    """The tests above once more, with every access watched: address and undefined-behaviour sanitizers."""
    preload = subprocess.run(
        [str(compiler()), '-print-file-name=libasan.so'], capture_output=True, text=True, check=True
    ).stdout.strip()
    environment = os.environ | {
        SANITIZE_VARIABLE: '1',
        'LD_PRELOAD': preload,
        'OMP_NUM_THREADS': '1',
        'UBSAN_OPTIONS': 'print_stacktrace=1',
        # The interpreter's own leaks are not the kernels'.
        'ASAN_OPTIONS': 'detect_leaks=0:detect_stack_use_after_return=0:alloc_dealloc_mismatch=0',
    }
    result = subprocess.run(
        [
            sys.executable,
            '-m',
            'pytest',
            '-q',
            '-x',
            '-p',
            'no:cacheprovider',
            __file__,
            '-k',
            'equal and bfloat16 or fit',
        ],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-5000:]
    assert ' passed' in result.stdout
