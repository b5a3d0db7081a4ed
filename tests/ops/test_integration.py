"""The scans within PyTorch: autocast, torch.compile, FLOP counting, meta tensors, checkpointing, threads of Python."""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import cuda_ops
from cuda_ops.route_scan import route_scan_flops
from cuda_ops.wavefront_scan import wavefront_scan_flops
from tests.ops.helpers import DTYPES, TOLERANCES, dtype_name
from tests.ops.route_cases import Case, Cross, Factors, LineFactors, Lines, OperatorFactors, Sequence, case_id
from tests.versions import needs_float16, since_torch_2_4

CASES = (
    Sequence(2, 6, 9, 2, B=2, z=True),
    Sequence(1, 3, 9, 2, B=0, C=0),
    Cross(2, 3, 5, 8, 1),
    Factors(2, 3, 5, 8, 1),
    Lines(2, 3, 5, 8, 2, 'row', B=False),
    LineFactors(2, 3, 5, 8, 2, 'column', both_ways=True),
)


def outputs_of(case: Case, inputs: dict[str, Tensor | None]) -> tuple[Tensor, ...]:
    outputs = case.function(**inputs, **case.options())
    return (outputs,) if isinstance(outputs, Tensor) else outputs


@pytest.mark.parametrize('dtype', (torch.bfloat16, torch.float16), ids=dtype_name)
@pytest.mark.parametrize('case', CASES, ids=case_id)
def test_autocast_gives_its_dtype_and_float32_gradients(case: Case, dtype: torch.dtype) -> None:
    needs_float16(dtype)
    inputs = {name: value if value is None else value.float().requires_grad_() for name, value in case.inputs().items()}
    expected = outputs_of(case, inputs)
    with torch.autocast('cpu', dtype):
        y, *last = outputs_of(case, inputs)
    assert y.dtype == dtype and all(state.dtype == torch.float32 for state in last)
    largest = 4 * TOLERANCES[dtype].largest
    torch.testing.assert_close(y.float(), expected[0], rtol=largest, atol=largest)
    y.float().sum().backward()
    for name, value in inputs.items():
        assert value is None or value.grad.dtype == torch.float32, name


def test_autocast_leaves_float64_alone() -> None:
    inputs = {name: value for name, value in Cross(1, 3, 5, 8, 1).inputs().items()}
    with torch.autocast('cpu', torch.bfloat16):
        y = cuda_ops.cross_selective_scan(**inputs)
    assert torch.equal(y, cuda_ops.cross_selective_scan(**inputs))


def test_autocast_brings_mixed_inputs_together() -> None:
    inputs = {name: value.float() for name, value in Cross(1, 3, 5, 8, 1).inputs().items()}
    inputs['delta'] = inputs['delta'].bfloat16()
    with pytest.raises(TypeError, match='delta must have the dtype of x'):
        cuda_ops.cross_selective_scan(**inputs)
    with torch.autocast('cpu', torch.bfloat16):
        assert cuda_ops.cross_selective_scan(**inputs).dtype == torch.bfloat16


@pytest.mark.parametrize('dtype', DTYPES, ids=dtype_name)
@pytest.mark.parametrize('case', CASES, ids=case_id)
def test_dtypes_of_outputs_and_gradients(case: Case, dtype: torch.dtype) -> None:
    """The output has the map's dtype, the state at least float32's precision, and a gradient its input's dtype."""
    needs_float16(dtype)
    # Parameters may come in the map's dtype as well.
    for parameters in {dtype, torch.float32, torch.float64}:
        inputs = {
            name: value
            if value is None
            else value.to(parameters if name in case.parameters() else dtype).requires_grad_()
            for name, value in case.inputs().items()
        }
        y, *last = outputs_of(case, inputs)
        assert y.dtype == dtype
        assert all(state.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) for state in last)
        y.sum().backward()
        for name, value in inputs.items():
            assert value is None or value.grad.dtype == value.dtype and value.grad.shape == value.shape, name


def small_block(x: Tensor, weight: Tensor, A_log: Tensor, D: Tensor) -> Tensor:
    """A user of the cross scan."""
    projected = x @ weight
    delta = projected[..., : 4 * x.shape[3]].unflatten(-1, (4, -1))
    B, C = projected[..., 4 * x.shape[3] :].unflatten(-1, (4, -1)).chunk(2, dim=-1)
    return cuda_ops.cross_selective_scan(x, delta, -A_log.exp(), B, C, D)


def block(x: Tensor, weight: Tensor, A_log: Tensor, D: Tensor) -> Tensor:
    """A user of all three scans."""
    y = small_block(x, weight, A_log, D)
    y = cuda_ops.line_scan(y, y.tanh(), -A_log[0].exp(), None, None, D[0], axis='column', reverse=True)
    sequence = y.flatten(1, 2).mT
    B = sequence[:, :2]
    y, last = cuda_ops.selective_scan(
        sequence, sequence.sin(), -A_log[1].exp(), B, B.cos(), delta_softplus=True, return_last_state=True
    )
    return y.tanh().sum() + last.square().sum()


def block_inputs(height: int, width: int, channels: int = 8) -> list[Tensor]:
    values = (
        torch.randn(2, height, width, channels),
        torch.randn(channels, 4 * channels + 16) / 3,
        torch.randn(4, channels, 2) / 3,
        torch.randn(4, channels),
    )
    return [value.requires_grad_() for value in values]


@since_torch_2_4
@pytest.mark.parametrize(
    ('function', 'backend', 'sizes'),
    (
        pytest.param(small_block, 'inductor', ((5, 7),), marks=pytest.mark.slow),
        (block, 'aot_eager', ((5, 7), (6, 9), (3, 11))),
    ),
    ids=('inductor', 'dynamic-shapes'),
)
def test_torch_compile_takes_the_scans_whole(
    function: Callable[..., Tensor], backend: str, sizes: tuple[tuple[int, int], ...]
) -> None:
    torch.compiler.reset()
    graphs = CompileCounterWithBackend(backend)
    compiled = torch.compile(function, fullgraph=True, backend=graphs, dynamic=len(sizes) > 1)
    for size in sizes:
        inputs = block_inputs(*size)
        expected, got = function(*inputs), compiled(*inputs)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        weight = torch.randn_like(expected)
        for value, grad in zip(
            torch.autograd.grad(got, inputs, weight), torch.autograd.grad(expected, inputs, weight), strict=True
        ):
            torch.testing.assert_close(value, grad, rtol=1e-4, atol=1e-4)
    assert graphs.frame_count == 1


def test_checkpointing_recomputes_the_same() -> None:
    inputs = block_inputs(5, 7)
    expected = torch.autograd.grad(block(*inputs), inputs)
    got = torch.autograd.grad(checkpoint(block, *inputs, use_reentrant=False), inputs)
    for value, grad in zip(got, expected, strict=True):
        assert torch.equal(value, grad)


@pytest.mark.parametrize(
    ('case', 'routes'),
    (
        (Sequence(3, 6, 35, 2, B=2), 1),
        (Sequence(2, 6, 35, 3, B=0), 1),
        (Cross(2, 5, 7, 6, 3), 4),
        (Lines(2, 5, 7, 6, 3, 'row'), 1),
    ),
    ids=lambda value: case_id(value) if not isinstance(value, int) else '',
)
def test_floating_point_operations_are_counted(case: Case, routes: int) -> None:
    """By torch's counter, for which a multiply-add is two."""
    inputs = {name: value if value is None else value.float() for name, value in case.inputs().items()}
    with FlopCounterMode(display=False) as counter:
        y = outputs_of(case, inputs)[0]
    assert counter.get_total_flops() == 2 * 9 * y.numel() * case.states * routes


@since_torch_2_4
@pytest.mark.parametrize('dynamic', (True, pytest.param(None, marks=pytest.mark.slow)))
@pytest.mark.parametrize(
    'kind',
    ('both ways', 'wavefront', *(pytest.param(kind, marks=pytest.mark.slow) for kind in ('cross', 'line', 'sequence'))),
)
def test_one_compiled_program_trains_on_maps_of_any_size(kind: str, dynamic: bool | None) -> None:
    A = -torch.ones(8, 2)

    def step(x: Tensor) -> Tensor:
        B = x[..., :2]
        if kind == 'wavefront':
            return cuda_ops.wavefront_scan(x, x.exp(), x.exp(), A, A, B, B, B, A[:, 0])
        if kind == 'cross':
            routes = x.unsqueeze(3).expand(-1, -1, -1, 4, -1)
            return cuda_ops.cross_selective_scan(x, routes, A.expand(4, -1, -1), routes[..., :2], routes[..., :2])
        if kind == 'sequence':
            u = x.flatten(1, 2).mT
            return cuda_ops.selective_scan(u, u, A, u[:, :2], u[:, :2], delta_softplus=True)
        return cuda_ops.line_scan(x, x, A, B, None, axis='column', both_ways=kind == 'both ways')

    counter = CompileCounterWithBackend('aot_eager')
    torch.compiler.reset()
    compiled = torch.compile(step, dynamic=dynamic, fullgraph=True, backend=counter)
    for height in range(18, 22):
        x = torch.randn(2, height, height + 3, 8, requires_grad=True)
        (expected,) = torch.autograd.grad(step(x).square().sum(), x)
        (got,) = torch.autograd.grad(compiled(x).square().sum(), x)
        torch.testing.assert_close(got, expected)
    assert counter.frame_count == (1 if dynamic else 2)


@pytest.mark.parametrize('routes', ([0, 2], [2, 0], [1, 3], [3, 1]))
def test_either_direction_may_come_first(routes: list[int]) -> None:
    inputs = {name: value.float() for name, value in Lines(1, 9, 4, 6, 2, 'row').inputs().items()}
    x, delta, A, B, C, D, bias = (inputs[name] for name in ('x', 'delta', 'A', 'B', 'C', 'D', 'delta_bias'))
    x.requires_grad_()
    given = (delta[:, :, :, None], A[None], B[:, :, :, None, None], C[:, :, :, None, None], D[None], bias[None])
    y = torch.ops.cuda_ops.route_scan(x, *given, routes, True, True, 0)[0]
    axis = 'row' if routes[0] in (0, 2) else 'column'
    expected = cuda_ops.line_scan(x, delta, A, B, C, D, bias, axis=axis, both_ways=True)
    torch.testing.assert_close(y, expected)
    grads = [torch.autograd.grad(each.square().sum(), x)[0] for each in (y, expected)]
    torch.testing.assert_close(*grads)


def traced(module: torch.nn.Module, x: Tensor) -> tuple[Any, str]:
    program = torch.jit.trace(module, x)
    return program, str(program.inlined_graph)


def exported(module: torch.nn.Module, x: Tensor) -> tuple[Any, str]:
    program = torch.export.export(module, (x,))
    return program.module(), str(program.graph)


@pytest.mark.parametrize('record', (traced, exported))
def test_programs_for_other_devices_scan_each_way_by_itself(record: Any) -> None:
    class BothWays(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            A, weight = -torch.ones(8, 2), torch.linspace(-1, 1, 16).view(8, 2)
            dt, B = x[..., :2], x[..., 2:4]
            return cuda_ops.line_scan(x, dt, A, B, None, delta_weight=weight, axis='row', both_ways=True)

    module, x = BothWays(), torch.randn(2, 3, 5, 8)
    program, graph = record(module, x)
    assert graph.count('cuda_ops::route_scan') + graph.count('cuda_ops.route_scan.default') == 2
    torch.testing.assert_close(program(x), module(x))


@pytest.mark.parametrize('side', (7, 600))
def test_both_ways_count_as_two_scans_and_one_projection(side: int) -> None:
    case = LineFactors(2, 5, side, 6, 16, 'row', both_ways=True, rank=4)
    with FlopCounterMode(display=False) as counter:
        y = case.function(**case.inputs(), **case.options())
    assert counter.get_total_flops() == 2 * y.numel() * (2 * 9 * 16 + 4)


@pytest.mark.parametrize('kind', (Factors, OperatorFactors))
def test_the_projection_of_dt_is_counted_wherever_it_is_computed(kind: type[Factors]) -> None:
    case = kind(2, 5, 7, 6, 3, rank=4)
    with FlopCounterMode(display=False) as counter:
        y = case.function(**case.inputs())
    assert counter.get_total_flops() == 2 * 4 * y.numel() * (9 * 3 + 4)


def test_flops_of_the_field_count_a_multiply_add_once() -> None:
    A, dt, weight = (4, 6, 3), (2, 5, 7, 4, 4), (4, 6, 4)
    grid = (2, 5, 7, 6)
    assert route_scan_flops(grid, (2, 5, 7, 4, 6), A) == 4 * 9 * 2 * 35 * 6 * 3
    rest = (None, None, None, None, [0, 1, 2, 3], False, True, 0)
    assert route_scan_flops(grid, dt, A, *rest, weight) == 4 * 2 * 35 * 6 * (9 * 3 + 4)
    assert wavefront_scan_flops(grid, grid, grid, (6, 3)) == 2 * 9 * 2 * 35 * 6 * 3


@pytest.mark.parametrize('case', CASES, ids=case_id)
def test_meta_tensors_give_shapes_and_dtypes(case: Case) -> None:
    inputs = {name: value if value is None else value.bfloat16() for name, value in case.inputs().items()}
    expected = outputs_of(case, inputs)
    got = outputs_of(case, {name: value if value is None else value.to('meta') for name, value in inputs.items()})
    for value, real in zip(got, expected, strict=True):
        assert value.is_meta and value.shape == real.shape and value.dtype == real.dtype


def test_concurrent_calls_do_not_disturb_each_other() -> None:
    inputs = [{name: value.float() for name, value in Cross(1, 16, 16, 24, 2).inputs().items()} for _ in range(8)]
    expected = [cuda_ops.cross_selective_scan(**each) for each in inputs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for got, value in zip(
                pool.map(lambda each: cuda_ops.cross_selective_scan(**each), inputs), expected, strict=True
            ):
                assert torch.equal(got, value)


def test_result_does_not_alias_the_inputs() -> None:
    """Inputs are left as they were, and outputs have memory of their own."""
    inputs = {name: value.float() for name, value in Cross(1, 3, 5, 8, 1).inputs().items()}
    before = {name: value.clone() for name, value in inputs.items()}
    y = cuda_ops.cross_selective_scan(**inputs)
    y.fill_(math.nan)
    for name, value in inputs.items():
        assert torch.equal(value, before[name]), name
