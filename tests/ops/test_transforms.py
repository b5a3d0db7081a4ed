"""Forward mode, ``torch.func``, ``torch.vmap`` and second derivatives of the scans, in every way that PyTorch has."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import cuda_ops
from cuda_ops import route_reference, wavefront_reference
from tests.ops.helpers import differentiate, relative_error
from tests.ops.route_cases import Case, Cross, Factors, Lines, Sequence, case_id
from tests.ops.wavefront_cases import Wavefront, loop
from tests.versions import since_torch_2_4

pytestmark = since_torch_2_4

CASES = (
    Cross(2, 3, 5, 3, 2),
    Cross(2, 1, 7, 2, 1, D=False, bias=False, softplus=False),
    Factors(2, 5, 2, 3, 2, rank=2),
    Lines(2, 2, 5, 3, 2, 'row', reverse=True, C=False),
    Lines(2, 5, 3, 2, 1, 'column', B=False, D=False),
    Lines(2, 2, 5, 3, 2, 'row', both_ways=True, C=False),
    Sequence(2, 4, 7, 2, B=2, C=4, z=True),
    Sequence(2, 3, 5, 2, B=0, C=0, softplus=False),
    Wavefront(2, 2, 4, 3, 2),
    Wavefront(2, 4, 1, 2, 1, reverse=True, D=False),
)
# Names of the inputs that have a batch in front.
MAPS = {'x', 'u', 'z', 'delta', 'delta_top', 'delta_left', 'B_top', 'B_left', 'B', 'C'}


@dataclass
class Problem:
    """A case as a function of a tuple of tensors, and the plain loop as another one."""

    names: list[str]
    values: tuple[Tensor, ...]
    call: Callable[..., Tensor]
    loop: Callable[..., Tensor]
    # 0 for an input with a batch, by position.
    batched: tuple[int | None, ...]

    def tangents(self) -> tuple[Tensor, ...]:
        return tuple(torch.randn_like(value) for value in self.values)

    def single(self, *values: Tensor) -> Tensor:
        """The scan of one image, whose inputs have no batch."""
        return self.call(
            *(value if dim is None else value.unsqueeze(0) for value, dim in zip(values, self.batched, strict=True))
        )[0]

    def numerical_tangent(self, tangents: tuple[Tensor, ...], step: float = 1e-6) -> Tensor:
        """By the loop and finite differences."""
        ahead, back = (
            [value + sign * step * tangent for value, tangent in zip(self.values, tangents, strict=True)]
            for sign in (1, -1)
        )
        return (self.loop(*ahead) - self.loop(*back)) / (2 * step)

    def ordinary_gradients(self, weight: Tensor) -> tuple[Tensor, ...]:
        leaves = [value.clone().requires_grad_() for value in self.values]
        return torch.autograd.grad(self.call(*leaves), leaves, weight)

    @property
    def argnums(self) -> tuple[int, ...]:
        return tuple(range(len(self.values)))


def first(outputs: Any) -> Tensor:
    return outputs if isinstance(outputs, Tensor) else outputs[0]


@pytest.fixture(params=CASES, ids=case_id)
def problem(request: pytest.FixtureRequest) -> Problem:
    return problem_of(request.param)


def problem_of(case: Case | Wavefront) -> Problem:
    inputs = case.inputs()
    given = {name: value for name, value in inputs.items() if value is not None}
    for name in given:
        if name.startswith('A'):
            # Far enough from zero for the rates to stay negative under finite differences.
            given[name] = given[name] - 0.1
    function, reference_loop = (
        (cuda_ops.wavefront_scan, loop) if isinstance(case, Wavefront) else (case.function, case.loop)
    )

    def with_names(function: Callable[..., Any]) -> Callable[..., Tensor]:
        return lambda *values: first(function(**{**inputs, **dict(zip(given, values, strict=True))}, **case.options()))

    constant = {name for name, value in given.items() if name in ('B', 'C') and value.dim() == 2}
    batched = tuple(0 if name in MAPS - constant else None for name in given)
    return Problem(list(given), tuple(given.values()), with_names(function), with_names(reference_loop), batched)


def by_func(call: Callable[..., Tensor], values: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> Tensor:
    return torch.func.jvp(call, values, tangents)[1]


def by_func_without_grad(
    call: Callable[..., Tensor], values: tuple[Tensor, ...], tangents: tuple[Tensor, ...]
) -> Tensor:
    with torch.no_grad():
        return by_func(call, values, tangents)


def by_dual_numbers(call: Callable[..., Tensor], values: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> Tensor:
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(value, tangent) for value, tangent in zip(values, tangents, strict=True)]
        tangent = forward_ad.unpack_dual(call(*duals)).tangent
        assert tangent is not None
        return tangent


def by_differentiating_twice(
    call: Callable[..., Tensor], values: tuple[Tensor, ...], tangents: tuple[Tensor, ...]
) -> Tensor:
    return torch.autograd.functional.jvp(call, values, tangents)[1]


def by_jacfwd(call: Callable[..., Tensor], values: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> Tensor:
    jacobians = torch.func.jacfwd(call, argnums=tuple(range(len(values))))(*values)
    return sum(
        (
            torch.tensordot(jacobian, tangent, tangent.dim())
            for jacobian, tangent in zip(jacobians, tangents, strict=True)
        ),
        torch.zeros(()),
    )


FORWARD = (by_func, by_func_without_grad, by_dual_numbers, by_differentiating_twice, by_jacfwd)


@pytest.mark.parametrize('way', FORWARD, ids=lambda way: way.__name__)
def test_tangents_are_the_numerical_ones(problem: Problem, way: Callable[..., Tensor]) -> None:
    tangents = problem.tangents()
    tangent = way(problem.call, problem.values, tangents)
    assert relative_error(tangent, problem.numerical_tangent(tangents)) < 1e-8


@pytest.mark.parametrize('case', (CASES[1], CASES[-1]), ids=case_id)
def test_linearized_scans_give_the_same_tangents(case: Case | Wavefront) -> None:
    problem = problem_of(case)
    tangents = problem.tangents()
    got = torch.func.linearize(problem.call, *problem.values)[1](*tangents)
    assert relative_error(got, problem.numerical_tangent(tangents)) < 1e-8


def test_tangents_of_some_inputs_alone(problem: Problem) -> None:
    for i, name in enumerate(problem.names):
        tangents = tuple(
            torch.randn_like(value) if i == j else torch.zeros_like(value) for j, value in enumerate(problem.values)
        )

        def call(value: Tensor, i: int = i) -> Tensor:
            return problem.call(*problem.values[:i], value, *problem.values[i + 1 :])

        exact = problem.numerical_tangent(tangents)
        for way in (by_func, by_dual_numbers, by_differentiating_twice):
            tangent = way(call, (problem.values[i],), (tangents[i],))
            torch.testing.assert_close(
                tangent, exact, rtol=1e-7, atol=1e-7, msg=lambda text, name=name: f'{name}: {text}'
            )


def test_the_value_beside_a_tangent_is_the_ordinary_one(problem: Problem) -> None:
    value, _ = torch.func.jvp(problem.call, problem.values, problem.tangents())
    assert torch.equal(value, problem.call(*problem.values))


@pytest.mark.parametrize('dtype', (torch.float32, torch.bfloat16))
def test_tangents_have_the_dtype_of_the_map(dtype: torch.dtype) -> None:
    problem = problem_of(Cross(2, 3, 5, 8, 2))
    values, tangents = (tuple(value.to(dtype) for value in each) for each in (problem.values, problem.tangents()))
    exact = problem_of(Cross(2, 3, 5, 8, 2)).loop
    tangent = by_func(problem.call, values, tangents)
    wide = by_func(exact, *(tuple(value.double() for value in each) for each in (values, tangents)))
    assert tangent.dtype == dtype
    assert relative_error(tangent, wide) < (1e-6 if dtype == torch.float32 else 1e-2)


def test_the_last_state_has_a_tangent() -> None:
    inputs = {name: value for name, value in Sequence(2, 3, 9, 2).inputs().items() if value is not None}
    tangent = torch.randn_like(inputs['u'])

    def last(u: Tensor) -> Tensor:
        return cuda_ops.selective_scan(**inputs | {'u': u}, return_last_state=True)[1]

    # It is linear in u.
    torch.testing.assert_close(by_func(last, (inputs['u'],), (tangent,)), last(tangent), rtol=1e-10, atol=1e-10)


def test_the_operators_themselves_have_tangents() -> None:
    x, tangent = torch.randn(2, 1, 3, 5, 4, dtype=torch.float64)
    A, ones = -torch.rand(1, 4, 2, dtype=torch.float64), torch.ones(1, 3, 5, 1, 4, dtype=torch.float64)

    def scan(x: Tensor) -> Tensor:
        return torch.ops.cuda_ops.route_scan(x, ones, A, None, None, None, None, [0], False, True, 0)[0]

    for way in (by_func, by_dual_numbers):
        torch.testing.assert_close(way(scan, (x,), (tangent,)), scan(tangent), rtol=1e-12, atol=1e-12)


def test_the_backward_operators_have_tangents_in_their_gradients(problem: Problem) -> None:
    """They are linear in those."""
    gradients = torch.func.vjp(problem.call, *problem.values)[1]
    weight, tangent = torch.randn(2, *problem.call(*problem.values).shape, dtype=torch.float64)
    for way in (by_func, by_dual_numbers):
        got = way(lambda weight: torch.cat([each.flatten() for each in gradients(weight)]), (weight,), (tangent,))
        expected = torch.cat([each.flatten() for each in problem.ordinary_gradients(tangent)])
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_gradients_by_functions_are_the_ordinary_ones(problem: Problem) -> None:
    weight = torch.randn_like(problem.call(*problem.values))
    expected = problem.ordinary_gradients(weight)

    def loss(*values: Tensor) -> Tensor:
        return (problem.call(*values) * weight).sum()

    jacobians = torch.func.jacrev(problem.call, argnums=problem.argnums)(*problem.values)
    found = {
        'grad': torch.func.grad(loss, argnums=problem.argnums)(*problem.values),
        'vjp': torch.func.vjp(problem.call, *problem.values)[1](weight),
        'jacrev': [torch.tensordot(weight, jacobian, weight.dim()) for jacobian in jacobians],
    }
    for way, gradients in found.items():
        for name, got, value in zip(problem.names, gradients, expected, strict=True):
            torch.testing.assert_close(
                got, value, rtol=1e-10, atol=1e-10, msg=lambda text, what=f'{way} in {name}': f'{what}: {text}'
            )


def test_gradients_within_no_grad(problem: Problem) -> None:
    weight = torch.randn_like(problem.call(*problem.values))
    with torch.no_grad():
        gradients = torch.func.vjp(problem.call, *problem.values)[1](weight)
    for got, value in zip(gradients, problem.ordinary_gradients(weight), strict=True):
        torch.testing.assert_close(got, value, rtol=1e-10, atol=1e-10)


def test_gradients_of_single_samples(problem: Problem) -> None:
    weight = torch.randn_like(
        problem.single(
            *(value if dim is None else value[0] for value, dim in zip(problem.values, problem.batched, strict=True))
        )
    )

    def loss(*values: Tensor) -> Tensor:
        return (problem.single(*values) * weight).square().sum()

    each = torch.vmap(torch.func.grad(loss, argnums=problem.argnums), in_dims=problem.batched)(*problem.values)
    for i in range(2):
        leaves = [
            (value if dim is None else value[i]).clone().requires_grad_()
            for value, dim in zip(problem.values, problem.batched, strict=True)
        ]
        for name, got, value in zip(problem.names, each, torch.autograd.grad(loss(*leaves), leaves), strict=True):
            torch.testing.assert_close(
                got[i], value, rtol=1e-10, atol=1e-10, msg=lambda text, what=f'{name} of sample {i}': f'{what}: {text}'
            )


def test_gradients_through_a_mapped_scan(problem: Problem) -> None:
    weight = torch.randn_like(problem.call(*problem.values))

    def loss(*values: Tensor) -> Tensor:
        return (torch.vmap(problem.single, in_dims=problem.batched)(*values) * weight).sum()

    gradients = torch.func.grad(loss, argnums=problem.argnums)(*problem.values)
    for got, value in zip(gradients, problem.ordinary_gradients(weight), strict=True):
        torch.testing.assert_close(got, value, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('size', (0, 1, 3))
def test_everything_mapped_over(problem: Problem, size: int) -> None:
    """As for an ensemble: parameters differ too. The mapped dimension is not the first one of each."""
    if size == 0 and not hasattr(torch.library, 'register_vmap'):
        pytest.skip('torch before 2.5 takes no rules for vmap, and cannot map over nothing')
    stacked = [torch.stack([value - 0.1 * i for i in range(3)], dim=-1)[..., :size] for value in problem.values]
    got = torch.vmap(problem.call, in_dims=-1)(*stacked)
    assert got.shape == (size, *problem.call(*problem.values).shape)
    for i in range(size):
        torch.testing.assert_close(got[i], problem.call(*(value[..., i] for value in stacked)), rtol=1e-12, atol=1e-12)


def test_numerical_check_in_every_mode(problem: Problem) -> None:
    leaves = tuple(value.clone().requires_grad_() for value in problem.values)
    assert torch.autograd.gradcheck(
        problem.call,
        leaves,
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
        fast_mode=True,
    )


def test_reference_has_second_derivatives(problem: Problem) -> None:
    leaves = tuple(value.clone().requires_grad_() for value in problem.values)
    with cuda_ops.use_reference():
        assert torch.autograd.gradcheck(
            problem.call, leaves, check_forward_ad=True, check_batched_grad=True, fast_mode=True
        )
        assert torch.autograd.gradgradcheck(
            problem.call, leaves, check_fwd_over_rev=True, check_batched_grad=True, fast_mode=True
        )


def test_reference_gives_the_same(problem: Problem) -> None:
    weight = torch.randn_like(problem.call(*problem.values))
    expected = problem.call(*problem.values), *problem.ordinary_gradients(weight)
    with cuda_ops.use_reference():
        got = problem.call(*problem.values), *problem.ordinary_gradients(weight)
    for value, other in zip(got, expected, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-10, atol=1e-10)


def test_reference_serves_within_its_block_alone() -> None:
    class Calls(torch.utils._python_dispatch.TorchDispatchMode):
        names: set[str] = set()

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.names.add(func.namespace)
            return func(*args, **(kwargs or {}))

    problem = problem_of(CASES[0])
    for block, expected in ((cuda_ops.use_reference(), False), (torch.enable_grad(), True)):
        Calls.names = set()
        with block, Calls():
            problem.call(*problem.values)
        assert ('cuda_ops' in Calls.names) == expected


def hessian_vector_products(call: Callable[..., Tensor]) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Products of the Hessian of ``call(x).square().sum()`` with a vector, in the ways that PyTorch has."""

    def loss(x: Tensor) -> Tensor:
        return call(x).square().sum()

    def backward_twice(x: Tensor, v: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(loss(x), x, create_graph=True)
        return torch.autograd.grad(grad, x, v)[0]

    def dual_numbers(x: Tensor, v: Tensor) -> Tensor:
        with forward_ad.dual_level():
            x = forward_ad.make_dual(x.clone().requires_grad_(), v)
            return forward_ad.unpack_dual(torch.autograd.grad(loss(x), x, create_graph=True)[0]).tangent

    grad = torch.func.grad
    return {
        'backward twice': backward_twice,
        'vhp': lambda x, v: torch.autograd.functional.vhp(loss, x, v)[1],
        'hvp': lambda x, v: torch.autograd.functional.hvp(loss, x, v)[1],
        'grad of grad': lambda x, v: grad(lambda x: (grad(loss)(x) * v).sum())(x),
        'jvp of grad': lambda x, v: torch.func.jvp(grad(loss), (x,), (v,))[1],
        'dual numbers': dual_numbers,
        'hessian': lambda x, v: torch.tensordot(torch.func.hessian(loss)(x), v, v.dim()),
    }


WAYS_OF_SECOND_ORDER = tuple(hessian_vector_products(first))


@pytest.mark.parametrize('way', WAYS_OF_SECOND_ORDER)
def test_second_derivatives_name_the_remedy_or_are_right(problem: Problem, way: str) -> None:
    # In delta, or the step sizes' top share: what the scan is not linear in.
    i = next(i for i, name in enumerate(problem.names) if name.startswith('delta'))
    x, v = problem.values[i], torch.randn_like(problem.values[i])

    def product(scan: Callable[..., Tensor]) -> Tensor:
        def call(x: Tensor) -> Tensor:
            return scan(*problem.values[:i], x, *problem.values[i + 1 :])

        return hessian_vector_products(call)[way](x, v)

    with pytest.raises(NotImplementedError, match=r'no second derivatives.*cuda_ops\.use_reference\(\)'):
        product(problem.call)
    with cuda_ops.use_reference():
        got = product(problem.call)
    torch.testing.assert_close(got, product(problem.loop), rtol=1e-8, atol=1e-8)


def test_gradient_of_a_tangent_is_right(problem: Problem) -> None:
    """Backward over forward: tangents come from PyTorch operations."""
    tangents = problem.tangents()

    def gradients(scan: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        return torch.func.grad(
            lambda *values: torch.func.jvp(scan, values, tangents)[1].square().sum(), argnums=problem.argnums
        )(*problem.values)

    for got, value in zip(gradients(problem.call), gradients(problem.loop), strict=True):
        torch.testing.assert_close(got, value, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize('case', (Cross(2, 1, 2, 4, 2), Wavefront(2, 1, 2, 4, 2)), ids=case_id)
@pytest.mark.parametrize(
    'way', (by_func, pytest.param(by_dual_numbers, marks=pytest.mark.slow)), ids=lambda way: way.__name__
)
def test_compiled_tangents_are_the_same(case: Case | Wavefront, way: Callable[..., Tensor]) -> None:
    problem = problem_of(case)
    tangents = problem.tangents()
    torch.compiler.reset()
    compiled = torch.compile(lambda *values: way(problem.call, values, tangents), fullgraph=True, backend='aot_eager')
    torch.testing.assert_close(
        compiled(*problem.values), way(problem.call, problem.values, tangents), rtol=1e-10, atol=1e-10
    )


def test_compiled_gradients_of_single_samples_are_the_same() -> None:
    problem = problem_of(Cross(2, 1, 2, 4, 2))
    samples = torch.vmap(
        torch.func.grad(lambda *values: problem.single(*values).square().sum(), argnums=2), in_dims=problem.batched
    )
    torch.compiler.reset()
    compiled = torch.compile(samples, fullgraph=True, backend='aot_eager')
    torch.testing.assert_close(compiled(*problem.values), samples(*problem.values), rtol=1e-10, atol=1e-10)


def test_transforms_of_a_compiled_scan_give_the_same() -> None:
    problem = problem_of(Cross(2, 2, 3, 4, 2))
    tangents = problem.tangents()
    torch.compiler.reset()
    compiled = torch.compile(problem.call, backend='aot_eager')
    for way in (by_func, by_dual_numbers):
        torch.testing.assert_close(
            way(compiled, problem.values, tangents), way(problem.call, problem.values, tangents), rtol=1e-10, atol=1e-10
        )


def test_reference_compiles_whole() -> None:
    problem = problem_of(Cross(2, 2, 3, 4, 2))
    torch.compiler.reset()
    with cuda_ops.use_reference():
        compiled = torch.compile(problem.call, fullgraph=True, backend='aot_eager')(*problem.values)
    torch.testing.assert_close(compiled, problem.call(*problem.values), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('strict', (True, False))
def test_exported_program_holds_one_operator_and_has_tangents(strict: bool) -> None:
    problem = problem_of(Cross(2, 2, 3, 4, 2))

    class Module(torch.nn.Module):
        def forward(self, *values: Tensor) -> Tensor:
            return problem.call(*values)

    program = torch.export.export(Module(), problem.values, strict=strict)
    scans = [node for node in program.graph.nodes if str(node.target).startswith('cuda_ops.')]
    assert [str(node.target) for node in scans] == ['cuda_ops.route_scan.default']
    tangents = problem.tangents()
    tangent = by_func(program.module(), problem.values, tangents)
    assert relative_error(tangent, problem.numerical_tangent(tangents)) < 1e-8


def test_written_out_gradients_of_the_reference_are_autograd_s() -> None:
    """What serves the backward operators where nothing is compiled."""
    for case in CASES[:5]:
        given, recorded = case.inputs(), []

        class Record(torch.overrides.TorchFunctionMode):
            def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None, to=recorded) -> Any:
                if func is torch.ops.cuda_ops.route_scan:
                    to.append(args)
                return func(*args, **(kwargs or {}))

        with Record():
            case.function(**given, **case.options())
        x, delta, A, B, C, D, bias, routes, per_line, softplus, _, weight = recorded[0]
        if weight is not None:
            delta = route_reference.low_rank_delta(delta, weight)
        inputs = dict(x=x, delta=delta, A=A, B=B, C=C, D=D, delta_bias=bias)
        options = dict(routes=routes, per_line=per_line, delta_softplus=softplus)
        # The state behind every single line is not kept.
        forward = (lambda **given: route_reference.route_scan(**given)[:1]) if per_line else route_reference.route_scan
        expected, (weight, *last) = differentiate(forward, inputs, options)
        got = route_reference.route_scan_backward(weight, last[0] if last else None, **inputs, **options)
        for name, value in got.items():
            torch.testing.assert_close(value, expected[f'grad {name}'], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('case', CASES[-2:], ids=str)
def test_written_out_gradients_of_the_wavefront_reference_are_autograd_s(case: Wavefront) -> None:
    inputs = case.inputs()
    expected, (weight,) = differentiate(wavefront_reference.wavefront_scan, inputs, case.options())
    got = wavefront_reference.wavefront_scan_backward(weight, **inputs, **case.options())
    for name, value in got.items():
        torch.testing.assert_close(value, expected[f'grad {name}'], rtol=1e-10, atol=1e-10)
