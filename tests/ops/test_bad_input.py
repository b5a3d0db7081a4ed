"""What is refused, as what kind of error, and that the message names the argument and the offending value."""

from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

import cuda_ops
from tests.ops.route_cases import Cross, Factors, LineFactors, Lines, Sequence

BASES = {
    'selective': Sequence(2, 6, 9, 3, B=2, z=True),
    'cross': Cross(2, 3, 5, 6, 3),
    'factors': Factors(2, 3, 5, 6, 3, rank=4),
    'line': Lines(2, 3, 5, 6, 3, 'row'),
    'line-factors': LineFactors(2, 3, 5, 6, 3, 'row', rank=4),
}
MAPS = {'selective': 'u', 'cross': 'x', 'factors': 'x', 'line': 'x', 'line-factors': 'x'}


def arguments(function: str) -> dict[str, Any]:
    """Valid arguments of a scan, in float32."""
    case = BASES[function]
    return {name: value.float() for name, value in case.inputs().items() if value is not None} | case.options()


def call(function: str, **changes: Any) -> Tensor | tuple[Tensor, ...]:
    """The scan with some arguments replaced; a function as a change is applied to the valid value."""
    given = arguments(function)
    given |= {name: change(given[name]) if callable(change) else change for name, change in changes.items()}
    return BASES[function].function(**given)


@pytest.mark.parametrize('function', BASES)
def test_the_base_arguments_are_valid(function: str) -> None:
    call(function)


SHAPES = [
    ('selective', 'u', lambda v: v[0], r'u must have 3 dimensions .*got shape \(6, 9\)'),
    ('selective', 'u', lambda v: v[..., :0], r'\(2, 6, 0\)'),
    ('selective', 'delta', lambda v: v[..., :8], r'delta must have shape \(2, 6, 9\).*got \(2, 6, 8\)'),
    ('selective', 'delta', lambda v: v[:1], r'delta must have shape \(2, 6, 9\).*got \(1, 6, 9\)'),
    ('selective', 'z', lambda v: v.mT, r'z must have shape \(2, 6, 9\).*got \(2, 9, 6\)'),
    ('selective', 'A', lambda v: v[0], r'A must have 2 dimensions .*got shape \(3,\)'),
    ('selective', 'A', lambda v: v[:5], r'A must have shape \(6, 3\).*got \(5, 3\)'),
    ('selective', 'A', lambda v: v[:, :0], r'A must hold at least one state.*\(6, 0\)'),
    ('selective', 'B', lambda v: v[:, :, :2], r'B must have shape \(2, 2, 3, 9\).*got \(2, 2, 2, 9\)'),
    ('selective', 'B', lambda v: v.repeat(1, 2, 1, 1), r'B has 4 groups, which do not divide the 6 channels'),
    ('selective', 'B', lambda v: v[:, :0], r'B has 0 groups'),
    ('selective', 'B', lambda v: v[0, 0, 0], r'B must have 4 dimensions .*got shape \(9,\)'),
    ('selective', 'B', lambda v: v[None], r'B must have 4 dimensions .*got shape \(1, 2, 2, 3, 9\)'),
    ('selective', 'C', lambda v: v[0].mT, r'C must have shape \(6, 3\).*got \(9, 3\)'),
    ('selective', 'C', lambda v: v.mT, r'C must have shape \(2, 3, 9\).*got \(2, 9, 3\)'),
    ('selective', 'D', lambda v: v[:5], r'D must have shape \(6,\).*got \(5,\)'),
    ('selective', 'delta_bias', lambda v: v[None], r'delta_bias must have shape \(6,\).*got \(1, 6\)'),
    ('cross', 'x', lambda v: v[0], r'x must have 4 dimensions .*got shape \(3, 5, 6\)'),
    ('cross', 'delta', lambda v: v[:, :, :, :3], r'delta must have shape \(2, 3, 5, 4, 6\).*got \(2, 3, 5, 3, 6\)'),
    ('cross', 'delta', lambda v: v.permute(0, 3, 1, 2, 4), r'delta must have shape .*got \(2, 4, 3, 5, 6\)'),
    ('cross', 'A', lambda v: v[0], r'A must have 3 dimensions .*got shape \(6, 3\)'),
    ('cross', 'A', lambda v: v[:3], r'A must have shape \(4, 6, 3\).*got \(3, 6, 3\)'),
    ('cross', 'A', lambda v: v[..., :0], r'(A must hold at least one state|B must have shape)'),
    ('cross', 'B', lambda v: v[..., :2], r'B must have shape \(2, 3, 5, 4, 3\).*got \(2, 3, 5, 4, 2\)'),
    ('cross', 'C', lambda v: v.mT, r'C must have shape \(2, 3, 5, 4, 3\).*got \(2, 3, 5, 3, 4\)'),
    ('cross', 'D', lambda v: v[0], r'D must have shape \(4, 6\).*got \(6,\)'),
    ('cross', 'delta_bias', lambda v: v.mT, r'delta_bias must have shape \(4, 6\).*got \(6, 4\)'),
    ('factors', 'delta', lambda v: v[..., :3], r'delta must have shape \(2, 3, 5, 4, 4\).*got \(2, 3, 5, 4, 3\)'),
    ('factors', 'delta', lambda v: v[:, :, :, 0], r'delta must have shape \(2, 3, 5, 4, 4\).*got \(2, 3, 5, 4\)'),
    ('factors', 'delta_weight', lambda v: None, r'delta must have shape \(2, 3, 5, 4, 6\).*got \(2, 3, 5, 4, 4\)'),
    ('factors', 'delta_weight', lambda v: v[0], r'delta_weight must have 3 dimensions .*got shape \(6, 4\)'),
    ('factors', 'delta_weight', lambda v: v.mT, r'delta_weight must have shape \(4, 6, 6\).*got \(4, 4, 6\)'),
    ('factors', 'delta_weight', lambda v: v[..., :0], r'delta_weight must have a dt_rank of at least 1.*\(4, 6, 0\)'),
    ('line', 'x', lambda v: v[None], r'x must have 4 dimensions .*got shape \(1, 2, 3, 5, 6\)'),
    ('line', 'delta', lambda v: v[:, :2], r'delta must have shape \(2, 3, 5, 6\).*got \(2, 2, 5, 6\)'),
    ('line', 'A', lambda v: v[None], r'A must have 2 dimensions .*got shape \(1, 6, 3\)'),
    ('line', 'B', lambda v: v.transpose(1, 2), r'B must have shape \(2, 3, 5, 3\).*got \(2, 5, 3, 3\)'),
    ('line', 'C', lambda v: v[..., 0], r'C must have shape \(2, 3, 5, 3\).*got \(2, 3, 5\)'),
    ('line', 'D', lambda v: v[:1], r'D must have shape \(6,\).*got \(1,\)'),
    ('line', 'delta_bias', lambda v: v[:1], r'delta_bias must have shape \(6,\).*got \(1,\)'),
    ('line-factors', 'delta', lambda v: v[..., :3], r'delta must have shape \(2, 3, 5, 4\).*got \(2, 3, 5, 3\)'),
    ('line-factors', 'delta_weight', lambda v: None, r'delta must have shape \(2, 3, 5, 6\).*got \(2, 3, 5, 4\)'),
    ('line-factors', 'delta_weight', lambda v: v[None], r'delta_weight must have 2 dimensions .*got shape \(1, 6, 4\)'),
    ('line-factors', 'delta_weight', lambda v: v.mT, r'delta_weight must have shape \(6, 6\).*got \(4, 6\)'),
    ('line-factors', 'delta_weight', lambda v: v[:, :0], r'delta_weight must have a dt_rank of at least 1.*\(6, 0\)'),
]


@pytest.mark.parametrize(
    ('function', 'name', 'change', 'message'),
    SHAPES,
    ids=[f'{function}-{name}-{i}' for i, (function, name, *_) in enumerate(SHAPES)],
)
def test_wrong_shapes(function: str, name: str, change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(function, **{name: change})


@pytest.mark.parametrize('size', ((2, 0, 5, 6), (2, 3, 0, 6), (2, 0, 0, 6)))
def test_maps_without_pixels(size: tuple[int, ...]) -> None:
    x = torch.zeros(size)
    with pytest.raises(ValueError, match=rf'height and width of at least 1.*\(2, {size[1]}, {size[2]}, 6\)'):
        cuda_ops.line_scan(x, x, -torch.ones(6, 1), None, None, axis='row')
    routes = torch.zeros(*size[:3], 4, 6)
    B = torch.zeros(*size[:3], 4, 1)
    with pytest.raises(ValueError, match=rf'height and width of at least 1.*\(2, {size[1]}, {size[2]}, 6\)'):
        cuda_ops.cross_selective_scan(x, routes, -torch.ones(4, 6, 1), B, B)


TENSORS = [
    (function, name) for function in BASES for name, value in arguments(function).items() if isinstance(value, Tensor)
]
GRIDS = [(function, name) for function, name in TENSORS if name not in BASES[function].parameters()]


@pytest.mark.parametrize(('function', 'name'), GRIDS)
def test_mixed_dtypes(function: str, name: str) -> None:
    for dtype in (torch.float64, torch.bfloat16):
        with pytest.raises(TypeError, match=rf'must have the dtype of {MAPS[function]}, .*convert it with'):
            call(function, **{name: lambda v, dtype=dtype: v.to(dtype)})


@pytest.mark.parametrize(('function', 'name'), TENSORS)
@pytest.mark.parametrize('dtype', (torch.int64, torch.bool, torch.complex64), ids=str)
def test_dtypes_that_are_not_real_numbers(function: str, name: str, dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=str(dtype)):
        call(function, **{name: lambda v: v.to(dtype)})


@pytest.mark.parametrize('function', BASES)
@pytest.mark.parametrize('dtype', (torch.int64, torch.complex64, torch.float8_e4m3fn), ids=str)
def test_maps_of_an_unsupported_dtype(function: str, dtype: torch.dtype) -> None:
    changes = {name: lambda v: v.to(dtype) for of, name in GRIDS if of == function}
    message = f'{MAPS[function]} must be float32, bfloat16, float16 or float64, got {dtype}'
    with pytest.raises(TypeError, match=message):
        call(function, **changes)
    with torch.autocast('cpu', torch.bfloat16), pytest.raises(TypeError, match=str(dtype)):
        call(function, **changes)


@pytest.mark.parametrize('name', ('B', 'C'))
def test_constant_projections_are_checked_too(name: str) -> None:
    with pytest.raises(TypeError, match=f'{name} must be a floating tensor, got torch.int64'):
        call('selective', **{name: torch.ones(6, 3, dtype=torch.int64)})
    with pytest.raises(ValueError, match=f'{name} is on meta'):
        call('selective', **{name: torch.ones(6, 3, device='meta')})


@pytest.mark.parametrize(('function', 'name'), TENSORS)
def test_mixed_devices(function: str, name: str) -> None:
    with pytest.raises(ValueError, match=r'(is on meta, the map is on cpu|is on cpu, the map is on meta)'):
        call(function, **{name: lambda v: v.to('meta')})


@pytest.mark.parametrize(('function', 'name'), TENSORS)
def test_things_that_are_no_tensors(function: str, name: str) -> None:
    for value in (numpy.zeros(3), 1.0, [1.0]):
        with pytest.raises(TypeError, match=rf'{name} must be a tensor.*got {type(value).__name__}'):
            call(function, **{name: value})


@pytest.mark.parametrize(
    ('function', 'name'),
    [
        ('selective', 'B'),
        ('selective', 'C'),
        ('cross', 'B'),
        ('cross', 'C'),
        ('selective', 'delta'),
        ('cross', 'A'),
        ('line', 'A'),
    ],
)
def test_none_where_a_tensor_is_needed(function: str, name: str) -> None:
    with pytest.raises(TypeError, match=f'{name} must be a tensor, got NoneType'):
        call(function, **{name: None})


@pytest.mark.parametrize('function', BASES)
@pytest.mark.parametrize('value', (1e-6, 3.0, float('inf'), float('-inf'), float('nan')))
def test_decay_rates_that_are_positive_or_not_finite(function: str, value: float) -> None:
    A = arguments(function)['A']
    A.view(-1)[-2] = value
    with pytest.raises(ValueError, match=f'A must be finite and not positive, got {value:g}'.replace('+', r'\+')):
        call(function, A=A)


def test_a_decay_rate_beyond_float32() -> None:
    with pytest.raises(ValueError, match='A must be finite and not positive, got -inf'):
        call('line', A=lambda v: v.double() * 1e300)


@pytest.mark.parametrize('axis', ('rows', 'Row', '', 0, 1, None, 'x'))
def test_unknown_axes(axis: object) -> None:
    with pytest.raises(ValueError, match=f"axis must be 'row' .* or 'column' .*got {axis!r}"):
        call('line', axis=axis)


def test_one_direction_and_both_are_not_asked_for_at_once() -> None:
    with pytest.raises(ValueError, match='reverse=True chooses one direction and both_ways=True asks for both'):
        call('line', reverse=True, both_ways=True)


def test_axis_is_not_guessed() -> None:
    given = arguments('line')
    del given['axis']
    with pytest.raises(TypeError, match='axis'):
        cuda_ops.line_scan(**given)


OPERATOR = [
    (dict(routes=[]), 'routes'),
    (dict(routes=[0] * 5), 'routes'),
    (dict(routes=[4]), 'routes are 0 to 3'),
    (dict(routes=[-1]), 'routes are 0 to 3'),
    (dict(routes=[0, 1], per_line=True), 'with per_line one, or one and its reverse'),
    (dict(routes=[1, 1], per_line=True), 'with per_line one, or one and its reverse'),
    (dict(routes=[1, 3], per_line=True, chunk=2), 'both ways need a chunk of a whole line, 3 positions, got 2'),
    (dict(chunk=-1), 'chunk must not be negative, got -1'),
    (dict(delta=lambda v: v[..., 0, :]), 'delta must have shape'),
    (dict(delta=lambda v: v.double()), 'delta must be'),
    (dict(A=lambda v: v.double()), 'A must be'),
    (dict(A=lambda v: v[0]), 'A must be'),
    (dict(A=lambda v: v[..., :0], B=None, C=None), 'A must hold at least one state'),
    (dict(B=lambda v: v[..., 0, 0]), 'B and C must be'),
    (dict(B=lambda v: v[..., 0]), 'B must have shape'),
    (dict(C=lambda v: v[..., :1]), 'C must have shape'),
    (dict(D=lambda v: v[0]), 'D must have shape'),
    (dict(delta_bias=lambda v: v.half()), 'delta_bias must be'),
    (dict(delta_weight=torch.randn(1, 6, 2)), 'delta must have shape'),
    (dict(delta_weight=torch.randn(1, 6, 0)), 'delta_weight must be'),
    (dict(delta_weight=torch.randn(6, 6)), 'delta_weight must be'),
    (dict(delta_weight=torch.randn(2, 6, 6)), 'delta_weight must have shape'),
    (dict(delta_weight=torch.randn(1, 6, 6).half()), 'delta_weight must be'),
]


@pytest.mark.parametrize(('changes', 'message'), OPERATOR, ids=range(len(OPERATOR)))
def test_the_operator_itself_refuses_what_its_kernel_cannot_read(changes: dict[str, Any], message: str) -> None:
    given = {
        'x': torch.randn(1, 3, 5, 6),
        'delta': torch.randn(1, 3, 5, 1, 6),
        'A': -torch.rand(1, 6, 2),
        'B': torch.randn(1, 3, 5, 1, 1, 2),
        'C': torch.randn(1, 3, 5, 1, 1, 2),
        'D': torch.randn(1, 6),
        'delta_bias': torch.randn(1, 6),
        'routes': [0],
        'per_line': False,
        'delta_softplus': True,
        'chunk': 0,
    }
    torch.ops.cuda_ops.route_scan(**given)
    given |= {name: change(given[name]) if callable(change) else change for name, change in changes.items()}
    with pytest.raises((ValueError, TypeError), match=message):
        torch.ops.cuda_ops.route_scan(**given)


@pytest.mark.parametrize('routes', ([0, 1], [0, 0], [0, 2, 0]))
def test_the_reference_refuses_routes_without_inputs_of_their_own(routes: list[int]) -> None:
    x, delta, A = torch.randn(1, 3, 5, 6), torch.randn(1, 3, 5, 1, 6), -torch.rand(1, 6, 2)
    with cuda_ops.use_reference(), pytest.raises(ValueError, match='inputs of 1 routes do not serve'):
        torch.ops.cuda_ops.route_scan(x, delta, A, None, None, None, None, routes, True, True, 0)


def test_the_backward_operator_refuses_states_of_another_chunk() -> None:
    x, delta, A = torch.randn(1, 3, 5, 6), torch.randn(1, 3, 5, 1, 6), -torch.rand(1, 6, 2)
    y, _, states = torch.ops.cuda_ops.route_scan(x, delta, A, None, None, None, None, [0], False, True, 4)
    rest = (x, delta, A, None, None, None, None)
    with pytest.raises(ValueError, match='states must have shape'):
        torch.ops.cuda_ops.route_scan_backward(y, None, *rest, states, [0], False, True, 3)
    with pytest.raises(ValueError, match='states must have shape'):
        torch.ops.cuda_ops.route_scan_backward(y, None, *rest, states, [0], True, True, 4)
    with pytest.raises(ValueError, match='grad_output must have shape'):
        torch.ops.cuda_ops.route_scan_backward(y[:, :2], None, *rest, states, [0], False, True, 4)
    with pytest.raises(ValueError, match='chunk of at least 1'):
        torch.ops.cuda_ops.route_scan_backward(y, None, *rest, states, [0], False, True, 0)
    stateless = (x, delta, A[..., :0], None, None, None, None)
    with pytest.raises(ValueError, match='at least one state'):
        torch.ops.cuda_ops.route_scan_backward(y, None, *stateless, states[..., :0, :], [0], False, True, 4)
