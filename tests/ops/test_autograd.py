"""The scans' registration with autograd: numerical gradients, PyTorch's own checks of operators, and the limits."""

from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor

import cuda_ops
from tests.ops.helpers import differentiate
from tests.ops.route_cases import Case, Cross, Factors, Lines, Sequence, case_id, decay_rates, normal
from tests.versions import since_torch_2_4

SMALL = (
    Sequence(1, 4, 5, 2, B=2, C=4, z=True),
    Sequence(2, 2, 3, 2, B=0, C=0, softplus=False),
    Cross(1, 2, 3, 3, 2),
    Factors(1, 2, 3, 3, 2, rank=2),
    Lines(2, 2, 3, 2, 2, 'row', C=False),
    Lines(1, 3, 2, 2, 1, 'column', reverse=True, B=False, D=False, bias=False, softplus=False),
)


@pytest.mark.parametrize('case', SMALL, ids=case_id)
def test_gradients_are_the_numerical_ones(case: Case) -> None:
    inputs = case.inputs()
    # Far enough from zero for the decay rates to stay negative under gradcheck's steps.
    inputs['A'] = inputs['A'] - 0.1
    given = {name: value.requires_grad_() for name, value in inputs.items() if value is not None}

    def call(*values: Tensor) -> Tensor | tuple[Tensor, ...]:
        return case.function(**inputs | dict(zip(given, values, strict=True)), **case.options())

    assert torch.autograd.gradcheck(call, tuple(given.values()))


@pytest.mark.parametrize(
    'case',
    (
        Sequence(1, 3, 40, 2, z=True),
        Sequence(1, 2, 3, 2, B=0),
        Cross(1, 5, 9, 3, 2),
        Factors(1, 5, 9, 3, 2, bias=False, D=False),
    ),
    ids=case_id,
)
def test_every_subset_of_inputs_can_be_differentiated(case: Case) -> None:
    inputs = {name: value.float() for name, value in case.inputs().items() if value is not None}
    expected, weights = differentiate(case.function, inputs, case.options())
    for count in range(1, len(inputs)):
        for chosen in combinations(inputs, count):
            leaves = {name: value.clone().requires_grad_(name in chosen) for name, value in inputs.items()}
            outputs = case.function(**leaves, **case.options())
            outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
            reached = [pair for pair in zip(outputs, weights, strict=True) if pair[0].requires_grad]
            torch.autograd.backward(*zip(*reached, strict=True))
            for name, leaf in leaves.items():
                if name not in chosen:
                    assert leaf.grad is None
                else:
                    assert torch.equal(leaf.grad, expected[f'grad {name}']), f'gradient of {name} out of {chosen}'


def operator_arguments(
    routes: list[int],
    chunk: int,
    *,
    height: int = 3,
    width: int = 5,
    channels: int = 4,
    states: int = 2,
    groups: int = 1,
    B: bool = True,
    C: bool = True,
    D: bool = True,
    per_line: bool = False,
    strided: bool = False,
    dtype: torch.dtype = torch.float32,
    rank: int = 0,
    requires_grad: bool = False,
) -> tuple[Any, ...]:
    """Arguments of the operator ``route_scan`` itself."""
    count = len(routes)
    # Programs of torch.export have no axis for one group.
    grouped = (groups,) if groups else ()
    grid, parameter = (2, height, width), torch.float64 if dtype == torch.float64 else torch.float32
    delta = normal(count, *grid, rank or channels).permute(1, 2, 3, 0, 4)
    values = (
        normal(*grid, channels).to(dtype),
        delta.to(dtype) if strided else delta.contiguous().to(dtype),
        decay_rates(count, channels, states).to(parameter),
        normal(*grid, count, *grouped, states).to(dtype) if B else None,
        normal(*grid, count, *grouped, states).to(dtype) if C else None,
        normal(count, channels).to(parameter) if D else None,
        normal(count, channels).to(parameter) if D else None,
    )
    weight = (normal(count, channels, rank).to(parameter),) if rank else ()
    values, weight = (
        tuple(value if value is None else value.requires_grad_(requires_grad) for value in group)
        for group in (values, weight)
    )
    return *values, routes, per_line, True, chunk, *weight


CONFIGURATIONS = {
    'cross': dict(routes=[0, 1, 2, 3], chunk=4, strided=True, requires_grad=True),
    'inference': dict(routes=[0, 1, 2, 3], chunk=0, strided=True),
    'rows': dict(routes=[2], chunk=2, per_line=True, B=False, requires_grad=True),
    'columns': dict(routes=[1], chunk=2, per_line=True, C=False, D=False, requires_grad=True),
    'sums': dict(routes=[3], chunk=64, B=False, C=False, requires_grad=True, dtype=torch.float64),
    'groups': dict(routes=[0], chunk=3, height=1, groups=2, requires_grad=True, dtype=torch.bfloat16),
    'exported': dict(routes=[0, 3], chunk=4, groups=0, requires_grad=True),
    'factors': dict(routes=[0, 1, 2, 3], chunk=4, strided=True, requires_grad=True, rank=3),
    'factors-inference': dict(routes=[1], chunk=0, rank=2, dtype=torch.bfloat16),
    'narrow': dict(routes=[0, 3], chunk=5, width=1, channels=1, states=1, requires_grad=True),
}


@since_torch_2_4
@pytest.mark.parametrize('name', CONFIGURATIONS)
def test_operator_passes_opcheck(name: str) -> None:
    arguments = operator_arguments(**CONFIGURATIONS[name])
    torch.library.opcheck(torch.ops.cuda_ops.route_scan.default, arguments)


@since_torch_2_4
@pytest.mark.parametrize('with_last', (False, True), ids=('output', 'output-and-state'))
@pytest.mark.parametrize('name', [name for name in CONFIGURATIONS if 'inference' not in name])
def test_backward_operator_passes_opcheck(name: str, with_last: bool) -> None:
    given = operator_arguments(**CONFIGURATIONS[name] | {'requires_grad': False})
    y, last, states = torch.ops.cuda_ops.route_scan(*given)
    arguments = (torch.randn_like(y), torch.randn_like(last) if with_last else None, *given[:7], states, *given[7:])
    torch.library.opcheck(torch.ops.cuda_ops.route_scan_backward.default, arguments)


@pytest.mark.parametrize('chunk', (1, 2, 3, 7, 14, 15, 16, 1000))
def test_saved_states_change_nothing(chunk: int) -> None:
    arguments = operator_arguments([0, 1, 2, 3], 5, dtype=torch.float64, states=3)
    given = {str(i): value for i, value in enumerate(arguments[:7])}

    def call(length: int):
        return lambda **values: torch.ops.cuda_ops.route_scan(*values.values(), *arguments[7:10], length)[:2]

    expected, weights = differentiate(call(5), given, {})
    for name, value in differentiate(call(chunk), given, {}, weights)[0].items():
        torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-12)


def test_operator_takes_any_routes_in_any_order() -> None:
    arguments = operator_arguments([3, 0, 0, 1], 4, dtype=torch.float64)
    x, delta, A, B, C, D, bias, routes, *_ = arguments
    y, last, _ = torch.ops.cuda_ops.route_scan(*arguments)
    singles = [
        torch.ops.cuda_ops.route_scan(
            x,
            delta[..., k : k + 1, :],
            A[k : k + 1],
            B[:, :, :, k : k + 1],
            C[:, :, :, k : k + 1],
            D[k : k + 1],
            bias[k : k + 1],
            [route],
            False,
            True,
            0,
        )
        for k, route in enumerate(routes)
    ]
    torch.testing.assert_close(y, sum(single[0] for single in singles))
    torch.testing.assert_close(last, torch.cat([single[1] for single in singles], dim=1))


def test_the_operator_chooses_what_to_save_for_a_backward_pass() -> None:
    arguments = operator_arguments([0, 2], 0, height=9, width=23, requires_grad=True, dtype=torch.float64)
    y, _, states = torch.ops.cuda_ops.route_scan(*arguments)
    assert states.numel()
    with torch.no_grad():
        assert not torch.ops.cuda_ops.route_scan(*arguments)[2].numel()
    expected = torch.autograd.grad(torch.ops.cuda_ops.route_scan(*arguments[:10], 3)[0].sum(), arguments[:7])
    for got, value in zip(torch.autograd.grad(y.sum(), arguments[:7]), expected, strict=True):
        torch.testing.assert_close(got, value, rtol=1e-12, atol=1e-12)


def test_states_are_saved_only_for_a_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    saved, operator = [], torch.ops.cuda_ops.route_scan

    def record(*args):
        outputs = operator(*args)
        saved.append(outputs[2])
        return outputs

    monkeypatch.setattr(torch.ops.cuda_ops, 'route_scan', record)
    inputs = {name: value.requires_grad_() for name, value in Cross(1, 16, 16, 3, 2).inputs().items()}
    cuda_ops.cross_selective_scan(**inputs)
    with torch.no_grad():
        cuda_ops.cross_selective_scan(**inputs)
    with torch.inference_mode():
        cuda_ops.cross_selective_scan(**inputs)
    cuda_ops.cross_selective_scan(**{name: value.detach() for name, value in inputs.items()})
    assert [states.numel() > 0 for states in saved] == [True, False, False, False]


def test_only_the_last_state_in_the_loss() -> None:
    case = Sequence(2, 3, 70, 2)
    inputs = {name: value.requires_grad_() for name, value in case.inputs().items() if value is not None}
    _, last = cuda_ops.selective_scan(**inputs, **case.options())
    last.sum().backward()
    _, expected = case.loop(
        **(again := {name: value.detach().clone().requires_grad_() for name, value in inputs.items()}), **case.options()
    )
    expected.sum().backward()
    for name in ('u', 'delta', 'A', 'B', 'delta_bias'):
        torch.testing.assert_close(inputs[name].grad, again[name].grad, rtol=1e-10, atol=1e-12)
    assert inputs['C'].grad.count_nonzero() == 0 and inputs['D'].grad.count_nonzero() == 0
