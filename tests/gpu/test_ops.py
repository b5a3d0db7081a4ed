"""The ops on a GPU against float64 loops, and what only a GPU has: streams, graphs, launch errors, many elements."""

import shutil
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import cuda_ops
from cuda_ops.route_scan import _takes_low_rank
from tests.ops.helpers import ROOT, check_against_loop, differentiate, dtype_name, rounded
from tests.ops.route_cases import CASES as ROUTE_CASES
from tests.ops.route_cases import PARAMETERS, Case, Cross, Factors, Lines, Sequence, case_id
from tests.ops.wavefront_cases import CASES as WAVEFRONT_CASES
from tests.ops.wavefront_cases import PARAMETERS as WAVEFRONT_PARAMETERS
from tests.ops.wavefront_cases import Wavefront, loop

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGE = (
    Cross(2, 56, 56, 96, 1),
    Cross(1, 90, 71, 48, 1),
    Cross(1, 40, 61, 35, 1),
    Cross(1, 40, 61, 192, 16),
    Factors(2, 56, 56, 96, 1, rank=6),
    Factors(1, 90, 71, 48, 1, rank=12),
    Sequence(2, 64, 4000, 16, z=True),
    Lines(2, 56, 56, 128, 16, 'column', reverse=True),
)
SOME = (
    Cross(2, 17, 23, 96, 1),
    Cross(1, 90, 71, 16, 1),
    Cross(1, 17, 23, 35, 1),
    Lines(2, 9, 40, 65, 16, 'row', reverse=True),
)


def on_gpu(function: Any) -> Any:
    """The function on the current device, with arguments and results on the CPU."""

    def call(**arguments: Any) -> Any:
        moved = {name: value.cuda() if isinstance(value, Tensor) else value for name, value in arguments.items()}
        outputs = function(**moved)
        return outputs.cpu() if isinstance(outputs, Tensor) else tuple(output.cpu() for output in outputs)

    return call


def gpu_inputs(case: Case | Wavefront, dtype: torch.dtype) -> dict[str, Tensor | None]:
    parameters = WAVEFRONT_PARAMETERS if isinstance(case, Wavefront) else PARAMETERS
    return {
        name: None if value is None else value.cuda()
        for name, value in rounded(case.inputs(), parameters, dtype).items()
    }


def function_of(case: Case | Wavefront) -> Any:
    return cuda_ops.wavefront_scan if isinstance(case, Wavefront) else case.function


@pytest.mark.parametrize('dtype', DTYPES, ids=dtype_name)
@pytest.mark.parametrize('case', (*ROUTE_CASES, *LARGE), ids=case_id)
def test_route_scans_equal_the_loop(nan_in_fresh_memory: None, case: Case, dtype: torch.dtype) -> None:
    check_against_loop(
        on_gpu(case.function), case.loop, case.inputs(), case.options(), case.parameters(), dtype, cuda=True
    )


@pytest.mark.parametrize('dtype', DTYPES, ids=dtype_name)
@pytest.mark.parametrize(
    'case',
    (*WAVEFRONT_CASES, Wavefront(2, 28, 28, 64, 16), Wavefront(1, 50, 20, 48, 16, True), Wavefront(1, 130, 9, 20, 11)),
    ids=str,
)
def test_wavefront_scan_equals_the_loop(nan_in_fresh_memory: None, case: Wavefront, dtype: torch.dtype) -> None:
    check_against_loop(
        on_gpu(cuda_ops.wavefront_scan), loop, case.inputs(), case.options(), WAVEFRONT_PARAMETERS, dtype, cuda=True
    )


@pytest.mark.parametrize('case', (*SOME, Wavefront(2, 30, 21, 40, 16)), ids=str)
def test_twice_the_same_bits(case: Case | Wavefront) -> None:
    inputs = gpu_inputs(case, torch.bfloat16)
    first, weights = differentiate(function_of(case), inputs, case.options())
    for _ in range(3):
        again, _ = differentiate(function_of(case), inputs, case.options(), weights)
        for name, value in first.items():
            assert torch.equal(value, again[name]), name


@pytest.mark.parametrize(
    'case', (Wavefront(1, 3000, 60, 64, 16), Wavefront(1, 40, 2000, 40, 11, reverse=True)), ids=str
)
def test_many_strips_of_one_image_wait_for_each_other(case: Wavefront) -> None:
    """More strips than blocks run at the same time: the same bits, also where other work leaves room for few blocks."""
    inputs = gpu_inputs(case, torch.bfloat16)
    first, weights = differentiate(cuda_ops.wavefront_scan, inputs, case.options())
    assert all(value.isfinite().all() for value in first.values())
    factor, stream = torch.randn(8192, 8192, device='cuda'), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    for busy in (False, True, True):
        if busy:
            with torch.cuda.stream(stream):
                for _ in range(10):
                    factor @ factor
        again, _ = differentiate(cuda_ops.wavefront_scan, inputs, case.options(), weights)
        with torch.no_grad():
            assert torch.equal(cuda_ops.wavefront_scan(**inputs, **case.options()), first['output0'])
        for name, value in first.items():
            assert torch.equal(value, again[name]), name
    torch.cuda.synchronize()


@pytest.mark.parametrize('case', (*SOME, Wavefront(2, 30, 21, 40, 16)), ids=str)
def test_another_stream_and_a_graph(case: Case | Wavefront) -> None:
    inputs = gpu_inputs(case, torch.float32)
    leaves = [value.requires_grad_() for value in inputs.values() if value is not None]

    def run() -> list[Tensor]:
        outputs = function_of(case)(**inputs, **case.options())
        output = outputs if isinstance(outputs, Tensor) else outputs[0]
        return [output, *torch.autograd.grad(output.square().sum(), leaves)]

    expected = run()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # Work that takes a while on this stream: a kernel on another one would not wait for it.
        torch.cuda._sleep(20_000_000)
        with torch.no_grad():
            for leaf in leaves:
                leaf.copy_(leaf * 1)
        on_stream = run()
    torch.cuda.current_stream().wait_stream(stream)
    for got, wanted in zip(on_stream, expected, strict=True):
        assert torch.equal(got, wanted)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for tensor in captured:
        tensor.detach().fill_(float('nan'))
    graph.replay()
    torch.cuda.synchronize()
    for got, wanted in zip(captured, expected, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize('case', (*SOME, Wavefront(2, 30, 21, 40, 16)), ids=str)
def test_nothing_waits_for_the_gpu(case: Case | Wavefront) -> None:
    inputs = gpu_inputs(case, torch.float32)
    torch.cuda.set_sync_debug_mode('error')
    try:
        function_of(case)(**inputs, **case.options())
    finally:
        torch.cuda.set_sync_debug_mode('default')


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason='there are no two GPUs')
def test_a_device_that_is_not_the_current_one() -> None:
    case = SOME[0]
    inputs = {
        name: None if value is None else value.to('cuda:1')
        for name, value in rounded(case.inputs(), PARAMETERS, torch.float32).items()
    }
    with torch.cuda.device(0):
        y = case.function(**inputs)
    assert y.device == torch.device('cuda:1')
    expected = case.function(**{name: None if value is None else value.to('cuda:0') for name, value in inputs.items()})
    assert torch.equal(y.cpu(), expected.cpu())


def test_step_sizes_of_factors_are_not_stored() -> None:
    inputs = gpu_inputs(Factors(8, 56, 56, 96, 1, rank=6), torch.bfloat16)
    x = inputs['x']
    assert x is not None and _takes_low_rank(x, 1, 6)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with torch.no_grad():
        cuda_ops.cross_selective_scan(**inputs)
    # The output is as large as x, the step sizes would be four times that.
    assert torch.cuda.max_memory_allocated() - before < 3 * x.nbytes


def test_mixed_devices_are_refused() -> None:
    inputs = gpu_inputs(SOME[0], torch.float32)
    with pytest.raises(ValueError, match='delta is on cpu, the map is on cuda:0'):
        cuda_ops.cross_selective_scan(**(inputs | {'delta': inputs['delta'].cpu()}))
    with pytest.raises(TypeError, match='float64'):
        cuda_ops.cross_selective_scan(**{name: value.double() for name, value in inputs.items()})


def test_a_failed_launch_raises_and_leaves_the_device_usable() -> None:
    x, delta, A = torch.randn(1, 150, 150, 4), torch.randn(1, 150, 150, 2, 4), -torch.rand(2, 4, 1)
    with pytest.raises(RuntimeError, match='pass a smaller chunk'):
        torch.ops.cuda_ops.route_scan(
            x.cuda(), delta.cuda(), A.cuda(), None, None, None, None, [0, 2], False, True, 20000
        )
    torch.cuda.synchronize()
    cuda_ops.cross_selective_scan(**gpu_inputs(SOME[0], torch.float32))
    torch.cuda.synchronize()


def test_out_of_memory_leaves_the_device_usable() -> None:
    x = torch.empty(1, device='cuda').expand(1, 2**15, 2**15, 512)
    with pytest.raises(torch.OutOfMemoryError):
        cuda_ops.line_scan(x, x, -torch.ones(512, 1, device='cuda'), None, None, axis='row')
    cuda_ops.cross_selective_scan(**gpu_inputs(SOME[0], torch.float32))
    torch.cuda.synchronize()


@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.mem_get_info()[1] < 40e9, reason='needs 40 GB')
def test_more_than_two_to_the_31_elements() -> None:
    """The last of many images equals the same image alone."""
    batch, height, width, channels = 350, 64, 1024, 96
    x = torch.randn(batch, height, width, channels, device='cuda', dtype=torch.bfloat16)
    assert x.numel() > 2**31
    A = -torch.rand(channels, 1, device='cuda')
    with torch.no_grad():
        last = cuda_ops.line_scan(x, x, A, None, None, axis='row')[-1:]
        alone = cuda_ops.line_scan(x[-1:], x[-1:], A, None, None, axis='row')
    assert torch.equal(last, alone)


@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.mem_get_info()[1] < 40e9, reason='needs 40 GB')
def test_more_than_two_to_the_31_step_sizes() -> None:
    """The last of many images equals the same image alone."""
    batch, height, width, channels = 700, 56, 56, 256
    grid = (batch, height, width, 4)
    x = torch.randn(batch, height, width, channels, device='cuda', dtype=torch.bfloat16)
    delta = torch.randn(*grid, channels, device='cuda', dtype=torch.bfloat16)
    assert delta.numel() > 2**31
    B, C = torch.randn(2, *grid, 1, device='cuda', dtype=torch.bfloat16)
    A = -torch.rand(4, channels, 1, device='cuda')
    with torch.no_grad():
        last = cuda_ops.cross_selective_scan(x, delta, A, B, C)[-1:]
        alone = cuda_ops.cross_selective_scan(x[-1:], delta[-1:], A, B[-1:], C[-1:])
    assert torch.equal(last, alone)


@pytest.mark.parametrize('case', (*SOME, Wavefront(2, 30, 21, 40, 16)), ids=str)
def test_compiled_and_autocast(case: Case | Wavefront) -> None:
    inputs = gpu_inputs(case, torch.float32)
    function = torch.compile(function_of(case), fullgraph=True)
    expected = function_of(case)(**inputs, **case.options())
    torch.testing.assert_close(function(**inputs, **case.options()), expected)
    with torch.autocast('cuda', torch.bfloat16):
        assert function_of(case)(**inputs, **case.options()).dtype == torch.bfloat16


SANITIZED = """
import torch
from tests.gpu.test_ops import SOME, Wavefront, differentiate, function_of, gpu_inputs
for case in (*SOME, Wavefront(1, 11, 9, 20, 16)):
    differentiate(function_of(case), gpu_inputs(case, torch.bfloat16), case.options())
torch.cuda.synchronize()
"""


@pytest.mark.skipif(shutil.which('compute-sanitizer') is None, reason='there is no compute-sanitizer')
@pytest.mark.parametrize('tool', ('memcheck', 'racecheck'))
def test_compute_sanitizer_finds_nothing(tool: str) -> None:
    result = subprocess.run(
        [
            'compute-sanitizer',
            '--tool',
            tool,
            '--error-exitcode',
            '9',
            '--kernel-regex',
            'kns=cuda_ops',
            sys.executable,
            '-c',
            SANITIZED,
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=500,
        env=None,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
