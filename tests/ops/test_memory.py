"""What the scans read and write: any layout of the inputs, every element of the outputs, no more memory than needed."""

import json

import pytest
import torch
from torch import Tensor

import cuda_ops
from cuda_ops import _library
from tests.ops.helpers import DTYPES, differentiate, dtype_name, rounded, run_python
from tests.ops.route_cases import CASES, Case, Cross, Factors, LineFactors, Lines, Sequence, case_id, decay_rates

LAYOUT_CASES = (
    Sequence(2, 6, 35, 3, B=2, C=3),
    Sequence(2, 6, 35, 1, z=True),
    Sequence(2, 5, 7, 2, B=0, C=-1),
    Cross(2, 5, 7, 18, 3),
    Cross(2, 3, 4, 16, 1),
    Factors(2, 3, 4, 17, 2, rank=5),
    Lines(2, 5, 7, 17, 3, 'row', reverse=True),
    Lines(2, 5, 7, 16, 1, 'column'),
    Lines(2, 5, 7, 17, 3, 'column', both_ways=True),
)


def swapped(value: Tensor) -> Tensor:
    """The same values with the last dimension's stride given to the first."""
    return value.transpose(0, -1).contiguous().transpose(0, -1)


def reversed_order(value: Tensor) -> Tensor:
    """The same values with the dimensions in memory in the opposite order."""
    dims = tuple(range(value.dim() - 1, -1, -1))
    return value.permute(dims).contiguous().permute(dims)


def sliced(value: Tensor) -> Tensor:
    """The same values with an offset, and a gap along every dimension."""
    padded = value.new_full([size + 3 for size in value.shape], float('nan'))
    window = padded[tuple(slice(2, 2 + size) for size in value.shape)]
    return window.copy_(value)


def strided(value: Tensor) -> Tensor:
    """The same values with every second element of the last dimension between them."""
    apart = value.new_full((*value.shape, 2), float('nan'))
    apart[..., 1] = value
    return apart[..., 1]


def expanded(value: Tensor) -> Tensor:
    """Equal values along the first dimension, which has no stride."""
    return value[:1].expand_as(value)


def expanded_last(value: Tensor) -> Tensor:
    """Equal values along the last dimension, which has no stride."""
    return value[..., :1].expand_as(value)


def single(value: Tensor) -> Tensor:
    """One value everywhere, in one element of memory."""
    return value.flatten()[0].expand(value.shape)


def kernel_alone(case: Case) -> bool:
    """Whether the compiled kernel computes all there is to compute."""
    if isinstance(case, Factors):
        return False
    return not isinstance(case, Sequence) or not (case.z or case.B == 0 or case.C == 0)


LAYOUTS = (swapped, reversed_order, sliced, strided, expanded, expanded_last, single)


@pytest.mark.parametrize('layout', LAYOUTS, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize('case', LAYOUT_CASES, ids=case_id)
def test_layout_of_the_inputs_changes_nothing(case: Case, layout) -> None:
    inputs = {name: value.float() for name, value in case.inputs().items() if value is not None}
    for name in (*inputs, None):
        arranged = {key: layout(value) if name in (key, None) else value for key, value in inputs.items()}
        contiguous = {key: value.contiguous() for key, value in arranged.items()}
        expected, weights = differentiate(case.function, contiguous, case.options())
        if layout in (swapped, reversed_order, sliced, strided):
            weights = [layout(weight) for weight in weights]
        got, _ = differentiate(case.function, arranged, case.options(), weights)
        for result, value in expected.items():
            # The gate, constant projections and dt's gradient are PyTorch's, whose last bit may depend on the layout.
            tolerance = 0 if kernel_alone(case) else 1e-5
            what = f'{result} with {name or "everything"} {layout.__name__}'
            torch.testing.assert_close(
                got[result], value, rtol=tolerance, atol=tolerance, msg=lambda text, what=what: f'{what}: {text}'
            )


def test_gradient_of_an_expanded_output() -> None:
    """The gradient of a sum has no strides at all."""
    inputs = {name: value.requires_grad_() for name, value in Cross(1, 5, 7, 18, 3).inputs().items()}
    expected = torch.autograd.grad(
        cuda_ops.cross_selective_scan(**inputs), list(inputs.values()), torch.ones(1, 5, 7, 18, dtype=torch.float64)
    )
    for got, grad in zip(
        torch.autograd.grad(cuda_ops.cross_selective_scan(**inputs).sum(), list(inputs.values())), expected, strict=True
    ):
        assert torch.equal(got, grad)


@pytest.mark.parametrize('dtype', DTYPES, ids=dtype_name)
def test_step_sizes_computed_route_by_route_are_not_copied(dtype: torch.dtype) -> None:
    """delta as it comes out of one product for each route: strided, and its gradient has the same strides."""
    case = Cross(2, 5, 7, 20, 1)
    inputs = rounded(case.inputs(), case.parameters(), dtype)
    expected, weights = differentiate(case.function, inputs, case.options())
    inputs['delta'] = inputs['delta'].permute(3, 0, 1, 2, 4).contiguous().permute(1, 2, 3, 0, 4)
    assert not inputs['delta'].is_contiguous()
    got, _ = differentiate(case.function, inputs, case.options(), weights)
    for name, value in expected.items():
        assert torch.equal(got[name], value), name
    assert got['grad delta'].stride() == inputs['delta'].stride()


@pytest.mark.usefixtures('nan_in_fresh_memory')
@pytest.mark.parametrize('dtype', DTYPES, ids=dtype_name)
@pytest.mark.parametrize('case', [case for case in CASES if case.batch], ids=case_id)
def test_every_element_is_written(case: Case, dtype: torch.dtype) -> None:
    results, _ = differentiate(case.function, rounded(case.inputs(), case.parameters(), dtype), case.options())
    for name, value in results.items():
        assert value.isfinite().all(), f'{name} holds memory that was never written'


@pytest.mark.usefixtures('nan_in_fresh_memory')
@pytest.mark.parametrize('per_line', (False, True), ids=('image', 'lines'))
@pytest.mark.parametrize('route', range(4))
def test_every_saved_state_is_written(route: int, per_line: bool) -> None:
    x = torch.randn(2, 9, 11, 35)
    delta, A = torch.randn(2, 9, 11, 1, 35), decay_rates(1, 35, 3).float()
    y, last, states = torch.ops.cuda_ops.route_scan(x, delta, A, None, None, None, None, [route], per_line, True, 4)
    assert states.numel() and y.isfinite().all() and last.isfinite().all() and states.isfinite().all()


@pytest.mark.usefixtures('nan_in_fresh_memory')
def test_gradients_of_parameters_of_an_empty_batch_are_zero() -> None:
    for case in [case for case in CASES if not case.batch]:
        results, _ = differentiate(
            case.function, rounded(case.inputs(), case.parameters(), torch.float32), case.options()
        )
        for name, value in results.items():
            assert not value.numel() or not value.count_nonzero(), name


@pytest.mark.usefixtures('threads')
@pytest.mark.parametrize(
    'case',
    (
        Sequence(3, 100, 200, 3, B=4, C=2),
        Cross(3, 16, 17, 100, 2),
        Cross(1, 24, 24, 96, 1),
        Factors(1, 24, 24, 96, 1),
        Lines(2, 37, 41, 72, 3, 'column'),
        Lines(1, 37, 41, 16, 1, 'row', C=False),
        Lines(2, 37, 41, 72, 3, 'column', both_ways=True),
    ),
    ids=case_id,
)
def test_threads_and_runs_change_no_bit(case: Case) -> None:
    inputs = {name: None if value is None else value.float() for name, value in case.inputs().items()}
    torch.set_num_threads(1)
    expected, weights = differentiate(case.function, inputs, case.options())
    for threads in (1, 2, 3, 2, 1):
        torch.set_num_threads(threads)
        got, _ = differentiate(case.function, inputs, case.options(), weights)
        for name, value in expected.items():
            assert torch.equal(got[name], value), f'{name} with {threads} threads'


@pytest.mark.skipif(not _library.STATUS.compiled, reason='the ops are not compiled')
@pytest.mark.parametrize(('rank', 'stored'), ((6, False), (32, False), (33, True)))
@pytest.mark.parametrize('kind', (Factors, LineFactors))
def test_the_cpu_kernel_does_not_store_the_delta_of_a_low_rank(kind: type, rank: int, stored: bool) -> None:
    case = Factors(1, 9, 8, 48, 1, rank=rank) if kind is Factors else LineFactors(1, 9, 32, 48, 2, 'row', rank=rank)
    inputs = {name: value.float().requires_grad_() for name, value in case.inputs().items() if value is not None}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda value: kept.append(tuple(value.shape)) or value, lambda value: value
    ):
        case.function(**inputs, **case.options())
    delta = (1, 9, 8, 4, 48) if kind is Factors else (1, 9, 32, 1, 48)
    assert (delta in kept) == stored, kept


PEAK = """
import json, re, torch, cuda_ops
def memory(kind):
    return int(re.search(kind + r':\\s+(\\d+) kB', open('/proc/self/status').read())[1]) * 1024
def step(height, width):
    x, delta, A = torch.randn(1, height, width, E), torch.randn(1, height, width, 4, E), -torch.rand(4, E, N)
    B, C, D = torch.randn(1, height, width, 4, N), torch.randn(1, height, width, 4, N), torch.randn(4, E)
    inputs = [value.requires_grad_() for value in (x, delta, A, B, C, D)]
    y = cuda_ops.cross_selective_scan(*inputs)
    torch.autograd.grad(y, inputs, torch.ones_like(y))
    return sum(value.nbytes for value in inputs), y.nbytes
E, N, SIDE = 64, 16, 160
step(4, 4)
before, peak_before = memory('VmRSS'), memory('VmHWM')
inputs, output = step(SIDE, SIDE)
peak = memory('VmHWM')
assert peak > peak_before, 'the step stays below the peak of the start-up, and measures nothing'
print(json.dumps(dict(extra=peak - before, inputs=inputs, output=output, states=4 * SIDE * SIDE * E * N * 4)))
"""


def test_hidden_states_are_never_stored_whole() -> None:
    result = run_python(PEAK)
    assert result.returncode == 0, result.stderr
    measured = json.loads(result.stdout)
    # Inputs and their gradients, the output and its gradient, the saved states, and a gradient before it is cast.
    needed = 2 * measured['inputs'] + 3 * measured['output'] + measured['states'] / 32
    assert measured['inputs'] < measured['extra'] < 1.1 * needed < measured['states'] / 3, measured
