"""The wavefront scan against a plain float64 loop over pixels, in its output and every gradient."""

import pytest
import torch

import cuda_ops
from tests.ops.helpers import DTYPES, check_against_loop, differentiate, dtype_name
from tests.ops.wavefront_cases import CASES, PARAMETERS, Wavefront, loop


@pytest.mark.parametrize('dtype', DTYPES, ids=dtype_name)
@pytest.mark.parametrize('case', CASES, ids=str)
def test_scan_and_gradients_equal_the_loop(case: Wavefront, dtype: torch.dtype) -> None:
    check_against_loop(cuda_ops.wavefront_scan, loop, case.inputs(), case.options(), PARAMETERS, dtype)


def test_a_large_map_keeps_its_precision() -> None:
    case = Wavefront(1, 28, 31, 32, 4)
    check_against_loop(cuda_ops.wavefront_scan, loop, case.inputs(), case.options(), PARAMETERS, torch.float32)


@pytest.mark.parametrize('dtype', DTYPES, ids=dtype_name)
def test_step_sizes_and_rates_of_any_magnitude(dtype: torch.dtype) -> None:
    """Decays that vanish, and those that are one."""
    case = Wavefront(2, 6, 7, 19, 3)
    inputs = case.inputs()
    pattern = torch.tensor([0.0, 1e-6, 1e-3, 0.3, 2.0, 20.0, 90.0, 1e3], dtype=torch.float64)
    for name, shift in (('delta_top', 0), ('delta_left', 3)):
        count = inputs[name].numel()
        inputs[name] = pattern.roll(shift).repeat(count // 8 + 1)[:count].view_as(inputs[name])
    for name in ('A_top', 'A_left'):
        inputs[name][:, 0] = -1e4
        inputs[name][:, 1] = 0
    # A rate of zero keeps everything, so the largest steps would add up beyond float16's range.
    for name in ('x', 'B_top', 'B_left'):
        inputs[name] = inputs[name] / 100
    check_against_loop(cuda_ops.wavefront_scan, loop, inputs, case.options(), PARAMETERS, dtype)


def test_what_the_borders_leave_out_has_no_part() -> None:
    """Step sizes and projections of a neighbour that is not there may be anything, and get no gradient."""
    case = Wavefront(2, 4, 5, 18, 3)
    inputs = case.inputs()
    expected, weights = differentiate(cuda_ops.wavefront_scan, inputs, case.options())
    for name in ('delta_top', 'B_top'):
        inputs[name][:, 0] = float('nan')
    for name in ('delta_left', 'B_left'):
        inputs[name][:, 1:, 0] = float('nan')
    got, _ = differentiate(cuda_ops.wavefront_scan, inputs, case.options(), weights)
    for name, value in expected.items():
        assert torch.equal(got[name], value), name
    assert not got['grad delta_top'][:, 0].count_nonzero() and not got['grad B_left'][:, 1:, 0].count_nonzero()
    assert got['grad delta_left'][:, 0, 0].count_nonzero() and not got['grad B_top'][:, 0].count_nonzero()
