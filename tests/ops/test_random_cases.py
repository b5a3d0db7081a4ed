"""The scans on cases that hypothesis draws, of all shapes, strides, dtypes and flags, against float64 loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import cuda_ops
from tests.ops import wavefront_cases
from tests.ops.helpers import DTYPES, TOLERANCES, rounded, three_ways
from tests.ops.route_cases import Cross, Factors, Lines, OperatorFactors, Sequence

flags = st.booleans()
# Whole vectors and parts of them, of each instruction set, and the states for which kernels are specialised.
batches, channels = st.integers(0, 3), st.one_of(st.integers(1, 9), st.sampled_from([15, 16, 17, 33]))
states = st.one_of(st.integers(1, 5), st.sampled_from([8, 16, 17]))
# Mostly short: the time is that of the loops over positions.
sides = st.sampled_from([*range(1, 6), *range(1, 6), 9, 17])


@st.composite
def sequences(draw: st.DrawFn) -> Sequence:
    count = draw(channels)
    groups = st.sampled_from([-1, 0, *(number for number in range(1, count + 1) if count % number == 0)])
    length = draw(st.one_of(st.integers(1, 9), st.sampled_from([31, 64, 65])))
    options = {name: draw(flags) for name in ('D', 'z', 'bias', 'softplus')}
    return Sequence(draw(batches), count, length, draw(states), draw(groups), draw(groups), **options)


def crosses(kind: type[Cross], **more: Any) -> st.SearchStrategy[Cross]:
    return st.builds(kind, batches, sides, sides, channels, states, flags, flags, flags, **more)


CASES = st.one_of(
    sequences(),
    crosses(Cross),
    crosses(Factors, rank=st.integers(1, 7)),
    crosses(OperatorFactors, rank=st.integers(1, 7)),
    st.builds(Lines, batches, sides, sides, channels, states, st.sampled_from(['row', 'column']), *[flags] * 6),
    st.builds(
        Lines,
        batches,
        sides,
        sides,
        channels,
        states,
        st.sampled_from(['row', 'column']),
        st.just(False),
        *[flags] * 5,
        both_ways=st.just(True),
    ),
    st.builds(wavefront_cases.Wavefront, batches, sides, sides, channels, states, flags, flags),
)


def laid_out(value: Tensor, order: list[float], step: int, offset: int) -> Tensor:
    """The same values with other strides: dims stored in another order, every step-th element of a larger tensor."""
    dims = sorted(range(value.dim()), key=lambda dim: order[dim])
    stored = value.permute(dims)
    memory = stored.new_full([*stored.shape[:-1], stored.shape[-1] * step + offset], float('nan'))
    part = memory[..., offset::step][..., : stored.shape[-1]]
    part.copy_(stored)
    return part.permute([dims.index(dim) for dim in range(value.dim())])


def check(data: st.DataObject) -> None:
    case, dtype = data.draw(CASES, label='case'), data.draw(st.sampled_from(DTYPES), label='dtype')
    torch.manual_seed(data.draw(st.integers(0, 2**31), label='seed'))
    if isinstance(case, wavefront_cases.Wavefront):
        function, loop, parameters = cuda_ops.wavefront_scan, wavefront_cases.loop, wavefront_cases.PARAMETERS
    else:
        function, loop, parameters = case.function, case.loop, case.parameters()
    inputs = rounded(case.inputs(), parameters, dtype)
    layout = st.tuples(st.lists(st.floats(0, 1), min_size=6, max_size=6), st.integers(1, 2), st.integers(0, 1))
    for name, value in inputs.items():
        if value is not None and data.draw(flags, label=f'{name} is not contiguous'):
            inputs[name] = laid_out(value, *data.draw(layout, label=name))
    got, reference, exact = three_ways(function, loop, inputs, case.options())
    assert got.keys() == exact.keys()
    for name, value in exact.items():
        assert got[name].shape == value.shape, name
        assert got[name].dtype == reference[name].dtype, name
        # The weight's gradient is a product of delta's, which is rounded to the map's dtype.
        rounded_to = dtype if name == 'grad delta_weight' else got[name].dtype
        error, other = ((result[name].double() - value).norm().item() for result in (got, reference))
        # Values are of the order of one. A single one may be near zero, where its relative error says nothing.
        scale = value.norm().item() + value.numel() ** 0.5
        assert error <= 2 * other + 4 * TOLERANCES[rounded_to].floor * scale, f'{name}: error {error:.3g}'


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_drawn_cases_equal_the_loop(data: st.DataObject) -> None:
    check(data)


@pytest.mark.slow
@settings(max_examples=2000, deadline=None, print_blob=True)
@given(st.data())
def test_more_drawn_cases_equal_the_loop(data: st.DataObject) -> None:
    check(data)
