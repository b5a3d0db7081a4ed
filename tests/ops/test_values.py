"""Unusual values: not finite, huge, tiny, and every value of the 16-bit types."""

import pytest
import torch
from torch import Tensor

import cuda_ops
from tests.ops.helpers import DTYPES, check_against_loop, differentiate, dtype_name
from tests.ops.route_cases import PARAMETERS, Case, Cross, Lines, Sequence, case_id

HALVES = (torch.float16, torch.bfloat16)


def every_value(dtype: torch.dtype) -> Tensor:
    """All 65536 bit patterns of a 16-bit type."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def scan_of_single_pixels(x: Tensor, **others: Tensor | None) -> Tensor:
    """A line scan of columns of one pixel, with a step size of zero unless it is given: y = D * x."""
    channels = x.shape[3]
    arguments = {
        'delta': torch.zeros_like(x),
        'A': -torch.ones(channels, 1),
        'B': None,
        'C': None,
        'D': torch.ones(channels),
    } | others
    return cuda_ops.line_scan(x, **arguments, delta_softplus=False, axis='column')


# With 64 channels whole vectors are loaded and stored, with 7 parts of them.
@pytest.mark.parametrize('channels', (64, 7))
@pytest.mark.parametrize('dtype', HALVES, ids=dtype_name)
def test_every_half_value_is_read_as_it_is(dtype: torch.dtype, channels: int) -> None:
    values = every_value(dtype)
    values = values[values.isfinite()]
    x = values[: values.numel() // channels * channels].view(1, 1, -1, channels)
    assert torch.equal(scan_of_single_pixels(x), x)
    # B and C are read one by one: with x, A and the step size at one, y = B * C.
    grid = values.view(1, 1, -1, 1)
    for name in 'BC':
        y = scan_of_single_pixels(torch.ones_like(grid), delta=torch.ones_like(grid), D=None, **{name: grid})
        assert torch.equal(y, grid), name


@pytest.mark.parametrize('dtype', HALVES, ids=dtype_name)
def test_not_a_number_and_infinity_are_read_as_they_are(dtype: torch.dtype) -> None:
    values = every_value(dtype)
    # A step of minus infinity is left out: its decay is infinite, and infinity times the state of zero is not a number.
    values = values[~values.isfinite() & ~values.isneginf()]
    x = torch.ones(values.numel(), dtype=dtype).view(1, 1, -1, 1)
    y = scan_of_single_pixels(x, delta=values.view_as(x), D=None).flatten()
    assert torch.equal(y.isnan(), values.isnan())
    assert torch.equal(y[~values.isnan()], values[~values.isnan()])


@pytest.mark.parametrize('channels', (64, 7))
@pytest.mark.parametrize('dtype', HALVES, ids=dtype_name)
def test_gradients_are_rounded_as_pytorch_rounds(dtype: torch.dtype, channels: int) -> None:
    """The gradient of such a step size is the product of x and the output's gradient, exact before it is rounded."""
    values = every_value(dtype)
    values = values[values.isfinite()]
    values = values[: values.numel() // channels * channels]
    # Against factors of every exponent, results overflow, become subnormal and vanish, and lie halfway in between.
    for factor in (1.0, 3.0, 129 / 128, 2.0**-6, 3 * 2.0**-10, 2.0**-14, 2.0**12, -1.5 * 2.0**-5):
        x = values.view(1, 1, -1, channels)
        grad_output = torch.full_like(x, factor)
        delta = torch.zeros_like(x).requires_grad_()
        scan_of_single_pixels(x, delta=delta).backward(grad_output)
        expected = (x.float() * grad_output.float()).to(dtype)
        assert torch.equal(delta.grad, expected), f'factor {factor}'


@pytest.mark.parametrize('bits', (0x7FC00000, 0x7FFFFFFF, -1, 0x7F800001), ids=hex)
@pytest.mark.parametrize('dtype', HALVES, ids=dtype_name)
def test_not_a_number_stays_one_when_it_is_rounded(dtype: torch.dtype, bits: int) -> None:
    """Whatever its bits are: those of a float32 parameter reach the gradient of the step size."""
    bias = torch.full((20,), bits, dtype=torch.int32).view(torch.float32)
    delta = torch.zeros(1, 1, 3, 20, dtype=dtype).requires_grad_()
    y = scan_of_single_pixels(torch.ones_like(delta), delta=delta, D=None, delta_bias=bias, C=delta.detach()[..., :1])
    assert y.isnan().all()
    x = torch.full_like(delta, 2.0).requires_grad_()
    y = scan_of_single_pixels(x, delta=delta, D=bias)
    y.sum().backward()
    assert y.isnan().all() and x.grad.isnan().all()
    delta.grad = None
    cuda_ops.line_scan(x, delta, -torch.ones(20, 1), None, None, None, bias, axis='column').sum().backward()
    assert delta.grad.isnan().all()


def test_both_ways_are_finite_where_two_scans_are() -> None:
    x, zeros = torch.full((1, 2, 3, 4), 3e38, requires_grad=True), torch.zeros(1, 2, 3, 4)
    given = (x, zeros, -torch.ones(4, 2), zeros[..., :2], zeros[..., :2], torch.full((4,), 0.25))
    y = cuda_ops.line_scan(*given, delta_softplus=False, axis='row', both_ways=True)
    torch.testing.assert_close(y, torch.full_like(y, 1.5e38))
    (grad,) = torch.autograd.grad(y, x, torch.full_like(y, 3e38))
    torch.testing.assert_close(grad, torch.full_like(y, 1.5e38))


CASES = (
    Sequence(3, 17, 70, 2),
    Cross(3, 6, 7, 33, 1),
    Cross(3, 4, 5, 16, 3),
    Lines(3, 5, 6, 20, 2, 'column'),
    Lines(3, 5, 6, 20, 2, 'row', both_ways=True),
)
PER_IMAGE = ('u', 'x', 'delta', 'B', 'C', 'z')


def not_finite(case: Case, dtype: torch.dtype, name: str, index: tuple[int, ...], value: float) -> tuple[dict, dict]:
    """Outputs and gradients of a case, and the same with one element of one input replaced."""
    inputs = {
        name: None if given is None else given.to(dtype if name in PER_IMAGE else torch.float32)
        for name, given in case.inputs().items()
    }
    clean, weights = differentiate(case.function, inputs, case.options())
    inputs[name] = inputs[name].clone()
    inputs[name][index] = value
    return clean, differentiate(case.function, inputs, case.options(), weights)[0]


@pytest.mark.parametrize('value', (float('nan'), float('inf')), ids=('nan', 'inf'))
@pytest.mark.parametrize('dtype', (torch.float32, torch.bfloat16), ids=dtype_name)
@pytest.mark.parametrize('case', CASES, ids=case_id)
def test_a_value_that_is_not_finite_stays_in_its_image(case: Case, dtype: torch.dtype, value: float) -> None:
    for name in ('x' if 'x' in case.inputs() else 'u', 'delta', 'B', 'C'):
        shape = case.inputs()[name].shape
        clean, dirty = not_finite(case, dtype, name, (1, *(size // 2 for size in shape[1:])), value)
        assert not dirty['output0'][1].isfinite().all(), f'{value} in {name} does not show in its own image'
        for result in clean:
            if result.startswith('output') or result.removeprefix('grad ') in PER_IMAGE:
                for image in (0, 2):
                    same = torch.equal(clean[result][image], dirty[result][image])
                    assert same, f'{value} in {name} reaches {result}'


def test_a_value_that_is_not_finite_stays_in_its_channel_and_future() -> None:
    case = Sequence(1, 33, 70, 2, bias=False)
    clean, dirty = not_finite(case, torch.float32, 'u', (0, 18, 40), float('nan'))
    same = clean['output0'] == dirty['output0']
    reached = torch.zeros_like(same)
    reached[0, 18, 40:] = True
    assert torch.equal(same, ~reached)
    # A gradient flows back in time, but through this input only at its own position.
    assert torch.equal(clean['grad u'], dirty['grad u'])
    delta_same = clean['grad delta'] == dirty['grad delta']
    assert delta_same[0, [e for e in range(33) if e != 18]].all() and delta_same[0, 18, :40].all()


def test_a_value_that_is_not_finite_stays_in_its_line() -> None:
    case = Lines(1, 5, 6, 20, 2, 'row', bias=False)
    clean, dirty = not_finite(case, torch.float32, 'x', (0, 3, 2, 7), float('nan'))
    reached = torch.zeros_like(clean['output0'], dtype=torch.bool)
    reached[0, 3, 2:, 7] = True
    assert torch.equal(clean['output0'] == dirty['output0'], ~reached)


@pytest.mark.parametrize('dtype', DTYPES, ids=dtype_name)
def test_step_sizes_of_any_magnitude(dtype: torch.dtype) -> None:
    """softplus of very large and very small values, decays that vanish, and those that are one."""
    case = Sequence(2, 19, 66, 3, bias=False)
    inputs = case.inputs()
    pattern = torch.tensor(
        [-1e4, -200.0, -90.0, -20.0, -1e-6, 0.0, 1e-6, 15.0, 19.9, 20.1, 30.0, 88.0, 100.0, 1e4], dtype=torch.float64
    )
    inputs['delta'] = pattern.repeat(2 * 19 * 66 // len(pattern) + 1)[: 2 * 19 * 66].view(2, 19, 66)
    inputs['A'][:, 0] = -1e4
    inputs['A'][:, 1] = 0
    # A rate of zero keeps everything, so the largest steps would add up beyond float16's range.
    inputs['u'] = inputs['u'] / 100
    inputs['B'] = inputs['B'] / 100
    check_against_loop(case.function, case.loop, inputs, case.options(), PARAMETERS, dtype)


def test_states_that_overflow_do_so_as_infinity() -> None:
    ones = torch.ones(1, 1, 4)
    y = cuda_ops.selective_scan(ones * 3e38, ones * 2, -ones[0, :, :1], ones, ones)
    assert y.isposinf().all()


def test_subnormal_numbers_survive() -> None:
    tiny = torch.full((1, 1, 3, 20), 1e-40)
    ones = torch.ones_like(tiny)
    y = cuda_ops.line_scan(tiny, ones, -torch.ones(20, 1), None, None, delta_softplus=False, axis='column')
    torch.testing.assert_close(y, tiny, rtol=1e-4, atol=0)
    y = cuda_ops.line_scan(ones, tiny, -torch.ones(20, 1), None, None, delta_softplus=False, axis='column')
    torch.testing.assert_close(y, tiny, rtol=1e-4, atol=0)
