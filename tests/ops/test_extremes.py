"""Inputs at the ends of what is allowed, and values that are not finite, for every scan."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import cuda_ops
from tests.ops import wavefront_cases
from tests.ops.helpers import check_against_loop, differentiate, dtype_name, relative_error, rounded
from tests.ops.route_cases import Cross, Lines, Sequence, case_id
from tests.ops.wavefront_cases import Wavefront

DTYPES = (torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow))
CASES = (
    Sequence(2, 17, 70, 3, bias=False),
    Cross(1, 9, 8, 17, 2, bias=False),
    Lines(1, 9, 8, 16, 1, 'column', bias=False),
    Lines(1, 9, 8, 16, 2, 'row', both_ways=True, bias=False),
    Wavefront(1, 9, 8, 17, 3),
)
STEPS = (-1e4, -200.0, -90.0, -20.0, -1e-6, 0.0, 1e-6, 15.0, 19.9, 20.1, 30.0, 88.0, 100.0, 1e4)
RATES = (-1e4, -1.0, -1e-4, -1e-8)
Case = Sequence | Cross | Lines | Wavefront


def pieces(case: Case) -> tuple[Any, Any, set[str]]:
    """The scan, its loop and the names of its parameters."""
    if isinstance(case, Wavefront):
        return cuda_ops.wavefront_scan, wavefront_cases.loop, wavefront_cases.PARAMETERS
    return case.function, case.loop, case.parameters()


def filled(value: Tensor, pattern: tuple[float, ...]) -> Tensor:
    """A pattern, over and over."""
    values = torch.tensor(pattern, dtype=torch.float64)
    return values.repeat(value.numel() // len(pattern) + 1)[: value.numel()].view(value.shape)


def replaced(case: Case, **change: Any) -> dict[str, Tensor | None]:
    """A case's inputs; a change is applied to all whose name begins with its own."""
    inputs = case.inputs()
    for name, value in inputs.items():
        for start, function in change.items():
            if value is not None and name.startswith(start) and name != 'delta_bias':
                inputs[name] = function(value)
    return inputs


def check(case: Case, inputs: dict[str, Tensor | None], dtype: torch.dtype) -> None:
    function, loop, parameters = pieces(case)
    check_against_loop(function, loop, inputs, case.options(), parameters, dtype)


@pytest.mark.parametrize('dtype', DTYPES, ids=dtype_name)
@pytest.mark.parametrize('case', CASES, ids=case_id)
def test_steps_and_decay_rates_of_any_magnitude(case: Case, dtype: torch.dtype) -> None:
    # A wavefront's step sizes have passed their softplus.
    steps = tuple(max(0.0, step) for step in STEPS) if isinstance(case, Wavefront) else STEPS
    small = lambda value: value / 1000  # noqa: E731  # the largest steps add up
    inputs = replaced(
        case, delta=lambda value: filled(value, steps), A=lambda value: filled(value, RATES), x=small, u=small, B=small
    )
    check(case, inputs, dtype)


@pytest.mark.parametrize('dtype', DTYPES, ids=dtype_name)
@pytest.mark.parametrize('case', CASES, ids=case_id)
def test_values_that_are_all_equal(case: Case, dtype: torch.dtype) -> None:
    inputs = {name: None if value is None else torch.full_like(value, 0.5) for name, value in case.inputs().items()}
    check(case, {name: -value if name.startswith('A') else value for name, value in inputs.items()}, dtype)


@pytest.mark.parametrize('case', CASES, ids=case_id)
def test_subnormal_values(case: Case) -> None:
    """Values too small for float32's full precision are neither lost nor taken for others."""
    function, loop, parameters = pieces(case)
    inputs = rounded(
        replaced(case, x=lambda value: value * 1e-40, u=lambda value: value * 1e-40), parameters, torch.float32
    )
    got, weights = differentiate(function, inputs, case.options())
    wide = {name: None if value is None else value.double() for name, value in inputs.items()}
    exact, _ = differentiate(loop, wide, case.options(), weights)
    for name, value in exact.items():
        # Sums of subnormal numbers have their spacing of 1.4e-45.
        bound = 1e-3 if value.abs().max() < 1e-37 else 1e-5
        assert relative_error(got[name].double() * 2.0**100, value * 2.0**100) < bound, name


SMALL = (
    Sequence(1, 4, 6, 2, B=2, C=2, z=True),
    Cross(1, 3, 4, 5, 2),
    Lines(1, 3, 4, 5, 2, 'row'),
    Lines(1, 4, 3, 5, 1, 'column', reverse=True),
    Wavefront(1, 3, 4, 5, 2),
    Wavefront(1, 4, 3, 5, 1, reverse=True),
)


@pytest.mark.parametrize('reference', [False, True], ids=['compiled', 'reference'])
@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_what_is_not_finite_comes_out_where_the_equations_take_it(reference: bool, data: st.DataObject) -> None:
    """NaN and infinity are at every position that depends on them, at no other, and never a number."""
    case = data.draw(st.sampled_from(SMALL), label='case')
    function, loop, parameters = pieces(case)
    inputs = replaced(case, A=lambda value: value / 10)
    name = data.draw(st.sampled_from([n for n, v in inputs.items() if v is not None and not n.startswith('A')]))
    place = data.draw(st.integers(0, inputs[name].numel() - 1), label=name)
    changed = {n: None if v is None else v.clone() for n, v in inputs.items()}
    changed[name].view(-1)[place] += 0.5
    options = {key: value for key, value in case.options().items() if key != 'return_last_state'}
    depends = loop(**inputs, **options) != loop(**changed, **options)
    changed[name].view(-1)[place] = data.draw(st.sampled_from([math.nan, math.inf]), label='value')
    arguments = rounded(changed, parameters, torch.float32)
    if reference:
        with cuda_ops.use_reference():
            output = function(**arguments, **options)
    else:
        output = function(**arguments, **options)
    assert torch.equal(~output.isfinite(), depends)
