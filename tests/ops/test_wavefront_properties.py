"""The wavefront scan's relations, registration, memory, and what it refuses."""

import importlib
import json
import math
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

import cuda_ops
from tests.ops.helpers import DTYPES, TOLERANCES, differentiate, dtype_name, rounded, run_python
from tests.ops.wavefront_cases import CASES, MAPS, PARAMETERS, Wavefront, loop
from tests.versions import since_torch_2_4

EXACT = dict(rtol=1e-12, atol=1e-12)
SCAN = torch.ops.cuda_ops.wavefront_scan
SCAN_BACKWARD = torch.ops.cuda_ops.wavefront_scan_backward


def inputs_of(case: Wavefront, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    inputs = rounded(case.inputs(), PARAMETERS, dtype)
    return {name: value for name, value in inputs.items() if value is not None}


def operator_arguments(
    case: Wavefront, chunk: int, dtype: torch.dtype = torch.float32, requires_grad: bool = False
) -> tuple[Any, ...]:
    """Arguments of the operator itself."""
    values = rounded(case.inputs(), PARAMETERS, dtype).values()
    return *(value if value is None else value.requires_grad_(requires_grad) for value in values), case.reverse, chunk


# Relations that follow from the equations.


@pytest.mark.parametrize('size', ((5, 7), (7, 5), (6, 6), (1, 5)))
def test_reverse_is_a_flip_before_and_after(size: tuple[int, int]) -> None:
    inputs = inputs_of(Wavefront(2, *size, 18, 3))
    flipped = {name: value.flip(1, 2) if name in MAPS else value for name, value in inputs.items()}
    assert torch.equal(cuda_ops.wavefront_scan(**inputs, reverse=True), cuda_ops.wavefront_scan(**flipped).flip(1, 2))


@pytest.mark.parametrize('reverse', (False, True))
@pytest.mark.parametrize('size', ((5, 7), (7, 5), (6, 6), (1, 5)))
def test_transposition_swaps_the_neighbours(size: tuple[int, int], reverse: bool) -> None:
    """But for the first pixel, whose state is the left neighbour's inflow: there both get the same inflow."""
    inputs = inputs_of(Wavefront(2, *size, 18, 3))
    first = -1 if reverse else 0
    for name in ('delta', 'B'):
        inputs[f'{name}_top'][:, first, first] = inputs[f'{name}_left'][:, first, first]
    turned = {name: value.transpose(1, 2) if name in MAPS else value for name, value in inputs.items()}
    for name in ('delta', 'A', 'B'):
        turned[f'{name}_top'], turned[f'{name}_left'] = turned[f'{name}_left'], turned[f'{name}_top']
    y = cuda_ops.wavefront_scan(**inputs, reverse=reverse)
    torch.testing.assert_close(cuda_ops.wavefront_scan(**turned, reverse=reverse).transpose(1, 2), y, **EXACT)


def test_the_first_pixel_takes_the_left_inflow() -> None:
    inputs = inputs_of(Wavefront(1, 1, 1, 4, 2, D=False))
    expected = (inputs['B_left'] * inputs['C']).sum(-1, keepdim=True) * inputs['delta_left'] * inputs['x']
    torch.testing.assert_close(cuda_ops.wavefront_scan(**inputs), expected, **EXACT)


def test_one_row_is_a_selective_scan_from_the_left_and_one_column_from_the_top() -> None:
    inputs = inputs_of(Wavefront(2, 1, 9, 6, 3))
    sequence = {name: inputs[name][:, 0].mT for name in ('x', 'delta_left', 'B_left', 'C')}
    expected = cuda_ops.selective_scan(
        sequence['x'], sequence['delta_left'], inputs['A_left'], sequence['B_left'], sequence['C'], inputs['D']
    )
    torch.testing.assert_close(cuda_ops.wavefront_scan(**inputs)[:, 0].mT, expected, **EXACT)
    inputs = inputs_of(Wavefront(2, 9, 1, 6, 3))
    # The first pixel takes the left neighbour's inflow, whatever the shape of the map.
    for name in ('delta', 'B'):
        inputs[f'{name}_top'][:, 0] = inputs[f'{name}_left'][:, 0]
    sequence = {name: inputs[name][:, :, 0].mT for name in ('x', 'delta_top', 'B_top', 'C')}
    expected = cuda_ops.selective_scan(
        sequence['x'], sequence['delta_top'], inputs['A_top'], sequence['B_top'], sequence['C'], inputs['D']
    )
    torch.testing.assert_close(cuda_ops.wavefront_scan(**inputs)[:, :, 0].mT, expected, **EXACT)


@pytest.mark.parametrize('at', ((0, 0), (2, 3), (0, 4), (5, 0)))
def test_without_decay_an_impulse_spreads_by_its_number_of_paths(at: tuple[int, int]) -> None:
    """Inside the map, half of a state goes either way; along the border on which it lies, all of it goes on."""
    height, width = 6, 7
    x = torch.zeros(1, height, width, 1, dtype=torch.float64)
    x[0, at[0], at[1]] = 1
    ones, still = torch.ones_like(x), torch.zeros(1, 1, dtype=torch.float64)
    y = cuda_ops.wavefront_scan(x, ones, ones, still, still, ones, ones, ones)[0, :, :, 0]
    expected = torch.zeros_like(y)
    for i in range(at[0], height):
        for j in range(at[1], width):
            down, right = i - at[0], j - at[1]
            if min(at) > 0:
                # Inside, the impulse's own inflow is the mean of two equal ones.
                expected[i, j] = math.comb(down + right, down) / 2 ** (down + right)
            elif at == (0, 0):
                # Both borders carry it undiminished, and so does the mean of two equal neighbours.
                expected[i, j] = 1
            else:
                along, across = (right, down) if at[0] == 0 else (down, right)
                # The last step that leaves the border decides; each pixel of the border is a source of a half.
                expected[i, j] = (
                    1
                    if across == 0
                    else sum(
                        math.comb(across - 1 + along - s, across - 1) / 2 ** (across + along - s)
                        for s in range(along + 1)
                    )
                )
    torch.testing.assert_close(y, expected, **EXACT)


def test_a_batch_is_its_images() -> None:
    inputs = inputs_of(Wavefront(3, 5, 7, 40, 2), torch.float32)
    y = cuda_ops.wavefront_scan(**inputs)
    order = [2, 0, 1]
    permuted = {name: value[order] if name in MAPS else value for name, value in inputs.items()}
    assert torch.equal(cuda_ops.wavefront_scan(**permuted), y[order])
    for image in range(3):
        alone = {name: value[image : image + 1] if name in MAPS else value for name, value in inputs.items()}
        assert torch.equal(cuda_ops.wavefront_scan(**alone), y[image : image + 1])


@pytest.mark.parametrize('value', (math.nan, math.inf), ids=str)
def test_a_value_that_is_not_finite_stays_in_its_image_channel_and_quadrant(value: float) -> None:
    inputs = inputs_of(Wavefront(2, 5, 6, 20, 2), torch.float32)
    clean = cuda_ops.wavefront_scan(**inputs)
    inputs['x'][1, 2, 3, 17] = value
    reached = torch.zeros_like(clean, dtype=torch.bool)
    reached[1, 2:, 3:, 17] = True
    assert torch.equal(cuda_ops.wavefront_scan(**inputs) == clean, ~reached)


# Gradients and registration.


@pytest.mark.parametrize('case', (Wavefront(1, 2, 3, 3, 2), Wavefront(2, 3, 2, 2, 1, reverse=True, D=False)), ids=str)
def test_gradients_are_the_numerical_ones(case: Wavefront) -> None:
    given = {name: value.requires_grad_() for name, value in inputs_of(case).items()}
    with torch.no_grad():
        # Far enough from zero for the decay rates to stay negative under gradcheck's steps.
        given['A_top'] -= 0.1
        given['A_left'] -= 0.1

    def call(*values: Tensor) -> Tensor:
        return cuda_ops.wavefront_scan(**dict(zip(given, values, strict=True)), **case.options())

    assert torch.autograd.gradcheck(call, tuple(given.values()))


def test_every_subset_of_inputs_can_be_differentiated() -> None:
    inputs = inputs_of(Wavefront(1, 3, 5, 3, 2), torch.float32)
    expected, weights = differentiate(cuda_ops.wavefront_scan, inputs, {})
    for count in (1, 2, 8):
        for chosen in combinations(inputs, count):
            leaves = {name: value.clone().requires_grad_(name in chosen) for name, value in inputs.items()}
            cuda_ops.wavefront_scan(**leaves).backward(weights[0])
            for name, leaf in leaves.items():
                if name not in chosen:
                    assert leaf.grad is None
                else:
                    assert torch.equal(leaf.grad, expected[f'grad {name}']), f'gradient of {name} out of {chosen}'


CONFIGURATIONS = {
    'rows': (Wavefront(2, 5, 3, 4, 2), 2, torch.float32, True),
    'columns': (Wavefront(2, 3, 5, 4, 2, reverse=True, D=False), 2, torch.float32, True),
    'inference': (Wavefront(2, 3, 5, 4, 2), 0, torch.float32, False),
    'halves': (Wavefront(1, 4, 4, 20, 3), 16, torch.bfloat16, True),
    'doubles': (Wavefront(1, 1, 5, 3, 1), 3, torch.float64, True),
}


@since_torch_2_4
@pytest.mark.parametrize('name', CONFIGURATIONS)
def test_operator_passes_opcheck(name: str) -> None:
    torch.library.opcheck(SCAN.default, operator_arguments(*CONFIGURATIONS[name]))


@since_torch_2_4
@pytest.mark.parametrize('name', [name for name in CONFIGURATIONS if name != 'inference'])
def test_backward_operator_passes_opcheck(name: str) -> None:
    case, chunk, dtype, _ = CONFIGURATIONS[name]
    *tensors, reverse, chunk = operator_arguments(case, chunk, dtype)
    y, *saved = SCAN(*tensors, reverse, chunk)
    torch.library.opcheck(SCAN_BACKWARD.default, (torch.randn_like(y), *tensors, *saved, reverse, chunk))


@pytest.mark.parametrize('size', ((13, 4), (4, 13), (1, 13)))
@pytest.mark.parametrize('chunk', (1, 2, 5, 12, 13, 14, 1000))
def test_saved_states_change_nothing(size: tuple[int, int], chunk: int) -> None:
    *tensors, reverse, _ = operator_arguments(Wavefront(2, *size, 20, 3, reverse=True), 0, torch.float64)
    given = {str(i): value for i, value in enumerate(tensors)}

    def call(lines: int) -> Any:
        return lambda **values: SCAN(*values.values(), reverse, lines)[0]

    assert SCAN(*tensors, reverse, chunk)[1].shape == (2, 12 // chunk, min(size), 3, 20)
    expected, weights = differentiate(call(3), given, {})
    for name, value in differentiate(call(chunk), given, {}, weights)[0].items():
        torch.testing.assert_close(value, expected[name], **EXACT)


def test_the_operator_refuses_maps_without_states() -> None:
    x, A, none = torch.randn(1, 4, 5, 6), -torch.ones(6, 0), torch.zeros(1, 4, 5, 0)
    with pytest.raises(ValueError, match=r'A_top must hold at least one state for each channel, got \[6, 0\]'):
        SCAN(x, x, x, A, A, none, none, none, None, False, 0)


def test_the_operator_chooses_what_to_save_for_a_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    # Larger maps would be saved anyway; the public function hides the module of its name.
    monkeypatch.setattr(importlib.import_module('cuda_ops.wavefront_scan'), '_CACHED_STATES', 1)
    arguments = operator_arguments(Wavefront(2, 13, 20, 3, 2), 0, requires_grad=True)
    y, states, _ = SCAN(*arguments)
    assert states.numel()
    with torch.no_grad():
        assert not SCAN(*arguments)[1].numel()
    given = [value for value in arguments[:9] if value is not None]
    expected = torch.autograd.grad(SCAN(*arguments[:10], 3)[0].sum(), given)
    for got, value in zip(torch.autograd.grad(y.sum(), given), expected, strict=True):
        torch.testing.assert_close(got, value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('dtype', (torch.bfloat16, torch.float16), ids=dtype_name)
def test_autocast_gives_its_dtype_and_float32_gradients(dtype: torch.dtype) -> None:
    inputs = inputs_of(Wavefront(2, 3, 5, 8, 2), torch.float32)
    inputs = {name: value.requires_grad_() for name, value in inputs.items()}
    expected = cuda_ops.wavefront_scan(**inputs)
    with torch.autocast('cpu', dtype):
        y = cuda_ops.wavefront_scan(**inputs)
    assert y.dtype == dtype
    largest = 4 * TOLERANCES[dtype].largest
    torch.testing.assert_close(y.float(), expected, rtol=largest, atol=largest)
    y.float().sum().backward()
    for name, value in inputs.items():
        assert value.grad.dtype == torch.float32, name


def user(x: Tensor, weight: Tensor, A_log: Tensor, D: Tensor) -> Tensor:
    """A user of the scan, with strided views of one projection."""
    delta_top, delta_left, B_top, B_left, C = (x @ weight).split((x.shape[3], x.shape[3], 2, 2, 2), dim=-1)
    delta_top, delta_left, A = delta_top.exp(), delta_left.exp(), -A_log.exp()
    y = cuda_ops.wavefront_scan(x, delta_top, delta_left, A[0], A[1], B_top, B_left, C, D).tanh()
    return cuda_ops.wavefront_scan(y, delta_left, delta_top, A[1], A[0], B_left, B_top, C, reverse=True)


@since_torch_2_4
@pytest.mark.parametrize(
    ('backend', 'sizes'),
    (
        ('inductor', ((5, 7),)),
        pytest.param('aot_eager', ((5, 7), (9, 6), (3, 11)), marks=pytest.mark.slow),
    ),
    ids=('inductor', 'dynamic-shapes'),
)
def test_torch_compile_takes_the_scan_whole(backend: str, sizes: tuple[tuple[int, int], ...]) -> None:
    torch.compiler.reset()
    graphs = CompileCounterWithBackend(backend)
    compiled = torch.compile(user, fullgraph=True, backend=graphs, dynamic=len(sizes) > 1)
    for size in sizes:
        inputs = [torch.randn(2, *size, 8), torch.randn(8, 22) / 3, torch.randn(2, 8, 2) / 3, torch.randn(8)]
        inputs = [value.requires_grad_() for value in inputs]
        expected, got = user(*inputs), compiled(*inputs)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        weight = torch.randn_like(expected)
        for value, grad in zip(
            torch.autograd.grad(got, inputs, weight), torch.autograd.grad(expected, inputs, weight), strict=True
        ):
            torch.testing.assert_close(value, grad, rtol=1e-4, atol=1e-4)
    if len(sizes) == 1:
        assert graphs.frame_count == 1


def test_floating_point_operations_are_counted() -> None:
    inputs = inputs_of(Wavefront(2, 5, 7, 6, 3), torch.float32)
    with FlopCounterMode(display=False) as counter:
        y = cuda_ops.wavefront_scan(**inputs)
    # Of two neighbours; a multiply-add is two for torch's counter.
    assert counter.get_total_flops() == 2 * 2 * 9 * y.numel() * 3


def test_meta_tensors_give_shapes_and_dtypes() -> None:
    inputs = inputs_of(Wavefront(2, 5, 7, 6, 3), torch.bfloat16)
    y = cuda_ops.wavefront_scan(**{name: value.to('meta').requires_grad_() for name, value in inputs.items()})
    assert y.is_meta and y.shape == (2, 5, 7, 6) and y.dtype == torch.bfloat16


# Memory: any layout of the inputs, every element of the outputs, no more than needed.


def strided(value: Tensor) -> Tensor:
    """The same values with gaps along the last dimension."""
    apart = value.new_full((*value.shape, 2), math.nan)
    apart[..., 1] = value
    return apart[..., 1]


def sliced(value: Tensor) -> Tensor:
    """The same values with an offset, and a gap along every dimension."""
    window = value.new_full([size + 3 for size in value.shape], math.nan)[tuple(slice(2, 2 + n) for n in value.shape)]
    return window.copy_(value)


def swapped(value: Tensor) -> Tensor:
    """The same values with the last dimension's stride given to the first."""
    return value.transpose(0, -1).contiguous().transpose(0, -1)


def expanded(value: Tensor) -> Tensor:
    """One value everywhere, in one element of memory."""
    return value.flatten()[0].expand(value.shape)


@pytest.mark.parametrize('layout', (strided, sliced, swapped, expanded), ids=lambda layout: layout.__name__)
def test_layout_of_the_inputs_changes_nothing(layout: Any) -> None:
    case = Wavefront(2, 5, 7, 18, 3, reverse=True)
    inputs = inputs_of(case, torch.float32)
    for name in (*inputs, None):
        arranged = {key: layout(value) if name in (key, None) else value for key, value in inputs.items()}
        contiguous = {key: value.contiguous() for key, value in arranged.items()}
        expected, weights = differentiate(cuda_ops.wavefront_scan, contiguous, case.options())
        got, _ = differentiate(
            cuda_ops.wavefront_scan,
            arranged,
            case.options(),
            [layout(weights[0]) if layout is not expanded else weights[0]],
        )
        for result, value in expected.items():
            assert torch.equal(got[result], value), f'{result} with {name or "everything"} {layout.__name__}'


def test_gradients_of_step_sizes_keep_their_strides() -> None:
    inputs = inputs_of(Wavefront(2, 5, 7, 18, 3), torch.float32)
    both = torch.stack([inputs['delta_top'], inputs['delta_left']], dim=3)
    inputs['delta_top'], inputs['delta_left'] = both.permute(3, 1, 0, 2, 4).contiguous().permute(0, 2, 1, 3, 4).unbind()
    assert not inputs['delta_top'].is_contiguous()
    got, _ = differentiate(cuda_ops.wavefront_scan, inputs, {})
    assert got['grad delta_top'].stride() == inputs['delta_top'].stride()


@pytest.mark.usefixtures('nan_in_fresh_memory')
@pytest.mark.parametrize('dtype', DTYPES, ids=dtype_name)
@pytest.mark.parametrize('case', CASES, ids=str)
def test_every_element_is_written(case: Wavefront, dtype: torch.dtype) -> None:
    results, _ = differentiate(cuda_ops.wavefront_scan, inputs_of(case, dtype), case.options())
    for name, value in results.items():
        assert value.isfinite().all(), f'{name} holds memory that was never written'
        assert case.batch or not value.count_nonzero(), f'{name} of an empty batch is not zero'


@pytest.mark.usefixtures('nan_in_fresh_memory')
@pytest.mark.parametrize('size', ((9, 4), (4, 9)))
def test_every_saved_state_is_written(size: tuple[int, int]) -> None:
    y, states, _ = SCAN(*operator_arguments(Wavefront(2, *size, 35, 3), 2))
    assert states.shape[1] == 4 and y.isfinite().all() and states.isfinite().all()


@pytest.mark.usefixtures('threads')
@pytest.mark.parametrize('case', (Wavefront(1, 24, 25, 96, 2), Wavefront(3, 17, 16, 100, 3, reverse=True)), ids=str)
def test_threads_and_runs_change_no_bit(case: Wavefront) -> None:
    inputs = inputs_of(case, torch.float32)
    torch.set_num_threads(1)
    expected, weights = differentiate(cuda_ops.wavefront_scan, inputs, case.options())
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        got, _ = differentiate(cuda_ops.wavefront_scan, inputs, case.options(), weights)
        for name, value in expected.items():
            assert torch.equal(got[name], value), f'{name} with {threads} threads'


MEASURE = """
import json, re, torch, cuda_ops
from torch.nn.functional import softplus
def memory(kind):
    return int(re.search(kind + r':\\s+(\\d+) kB', open('/proc/self/status').read())[1]) * 1024
def inputs(batch, height, width, channels, states):
    maps = [torch.randn(batch, height, width, channels) for _ in range(3)]
    rates = [-torch.rand(channels, states) for _ in range(2)]
    projections = [torch.randn(batch, height, width, states) for _ in range(3)]
    values = [maps[0], softplus(maps[1]), softplus(maps[2]), *rates, *projections, torch.randn(channels)]
    return [value.requires_grad_() for value in values]
def step(values):
    y = cuda_ops.wavefront_scan(*values)
    weights = torch.ones_like(y)
    return y, weights, *torch.autograd.grad(y, values, weights)
step(inputs(1, 4, 4, 64, 16))
for shape in ((8, 56, 56, 64, 16), (1, 512, 512, 16, 4)):
    values = results = None
    values = inputs(*shape)
    before = memory('VmRSS')
    # The high-water mark starts anew, at what is in use now.
    open('/proc/self/clear_refs', 'w').write('5')
    results = step(values)
    extra = memory('VmHWM') - before - sum(result.nbytes for result in results)
    assert all(result.isfinite().all() for result in results)
    batch, height, width, channels, states = shape
    print(json.dumps(dict(extra=extra, states=4 * batch * height * width * channels * states)))
"""


def test_hidden_states_are_never_stored_whole() -> None:
    """Beside inputs, output and gradients, an eighth of what the hidden states would take is enough."""
    # Freed memory is given back at once, so that one shape's is not the next one's.
    variables = dict(MALLOC_MMAP_THRESHOLD_='65536', MALLOC_TRIM_THRESHOLD_='65536')
    result = run_python(MEASURE, OMP_NUM_THREADS='2', **variables)
    assert result.returncode == 0, result.stderr
    for line in result.stdout.splitlines():
        measured = json.loads(line)
        # The states of the saved lines, at least, have to be somewhere: less would mean that the peak was missed.
        assert measured['states'] / 32 < measured['extra'] < measured['states'] / 8, measured


# What is refused, and that the message names the argument and the offending value.

SHAPES = [
    ('x', lambda v: v[0], r'x must have 4 dimensions .*got shape \(3, 5, 6\)'),
    ('delta_top', lambda v: v[:, :2], r'delta_top must have shape \(2, 3, 5, 6\).*got \(2, 2, 5, 6\)'),
    ('delta_left', lambda v: v.transpose(1, 2), r'delta_left must have shape \(2, 3, 5, 6\).*got \(2, 5, 3, 6\)'),
    ('A_top', lambda v: v[0], r'A_top must have 2 dimensions .*got shape \(3,\)'),
    ('A_top', lambda v: v[:5], r'A_top must have shape \(6, 3\).*got \(5, 3\)'),
    ('A_left', lambda v: v[:, :2], r'A_left must have shape \(6, 3\).*got \(6, 2\)'),
    ('B_top', lambda v: v[..., :2], r'B_top must have shape \(2, 3, 5, 3\).*got \(2, 3, 5, 2\)'),
    ('B_left', lambda v: v[:1], r'B_left must have shape \(2, 3, 5, 3\).*got \(1, 3, 5, 3\)'),
    ('C', lambda v: v[..., 0], r'C must have shape \(2, 3, 5, 3\).*got \(2, 3, 5\)'),
    ('D', lambda v: v[:1], r'D must have shape \(6,\).*got \(1,\)'),
]


def call(**changes: Any) -> Tensor:
    """The scan of valid arguments, some of them changed by a function."""
    inputs: dict[str, Any] = inputs_of(Wavefront(2, 3, 5, 6, 3), torch.float32)
    return cuda_ops.wavefront_scan(**inputs | {name: change(inputs[name]) for name, change in changes.items()})


@pytest.mark.parametrize(
    ('name', 'change', 'message'), SHAPES, ids=[f'{name}-{i}' for i, (name, *_) in enumerate(SHAPES)]
)
def test_wrong_shapes(name: str, change: Any, message: str) -> None:
    call()
    with pytest.raises(ValueError, match=message):
        call(**{name: change})


@pytest.mark.parametrize('size', ((2, 0, 5, 6, 3), (2, 3, 0, 6, 3), (2, 3, 5, 0, 3), (2, 3, 5, 6, 0)))
def test_maps_without_pixels_channels_or_states(size: tuple[int, ...]) -> None:
    grid, channels, states = size[:3], size[3], size[4]
    x, A, B = torch.zeros(*grid, channels), torch.zeros(channels, states), torch.zeros(*grid, states)
    with pytest.raises(ValueError, match='at least (1|one)'):
        cuda_ops.wavefront_scan(x, x, x, A, A, B, B, B)


@pytest.mark.parametrize('name', MAPS[1:])
def test_mixed_dtypes(name: str) -> None:
    for dtype in (torch.float64, torch.bfloat16):
        with pytest.raises(TypeError, match=f'{name} must have the dtype of x, .*convert it with'):
            call(**{name: lambda value, dtype=dtype: value.to(dtype)})


@pytest.mark.parametrize('name', (*MAPS, *sorted(PARAMETERS)))
def test_what_is_no_real_tensor(name: str) -> None:
    with pytest.raises(TypeError, match=f'(x|{name}) must'):
        call(**{name: lambda value: value.to(torch.int64)})
    with pytest.raises(TypeError, match=f'{name} must be a tensor'):
        call(**{name: lambda value: value.tolist()})


@pytest.mark.parametrize('value', (0.5, math.nan, -math.inf), ids=str)
@pytest.mark.parametrize('name', ('A_top', 'A_left'))
def test_wrong_decay_rates(name: str, value: float) -> None:
    def change(rates: Tensor) -> Tensor:
        rates[3, 1] = value
        return rates

    message = f'{name} must be finite and not positive, got -?{abs(value):g}'
    with pytest.raises(ValueError, match=message):
        call(**{name: change})
    with cuda_ops.use_reference(), pytest.raises(ValueError, match=message):
        call(**{name: change})


def test_the_loop_itself_has_the_borders_of_the_equations() -> None:
    """The tests' oracle on a map of 2x2, written out."""
    inputs = inputs_of(Wavefront(1, 2, 2, 1, 1, D=False))
    x, dT, dL, bT, bL, c = (
        {(i, j): inputs[name][0, i, j, 0].item() for i in (0, 1) for j in (0, 1)}
        for name in ('x', 'delta_top', 'delta_left', 'B_top', 'B_left', 'C')
    )
    AT, AL = inputs['A_top'].item(), inputs['A_left'].item()
    h00 = dL[0, 0] * bL[0, 0] * x[0, 0]
    h01 = math.exp(dL[0, 1] * AL) * h00 + dL[0, 1] * bL[0, 1] * x[0, 1]
    h10 = math.exp(dT[1, 0] * AT) * h00 + dT[1, 0] * bT[1, 0] * x[1, 0]
    h11 = 0.5 * (
        math.exp(dL[1, 1] * AL) * h10
        + dL[1, 1] * bL[1, 1] * x[1, 1]
        + math.exp(dT[1, 1] * AT) * h01
        + dT[1, 1] * bT[1, 1] * x[1, 1]
    )
    expected = torch.tensor([c[0, 0] * h00, c[0, 1] * h01, c[1, 0] * h10, c[1, 1] * h11], dtype=torch.float64)
    torch.testing.assert_close(loop(**inputs).flatten(), expected, **EXACT)
    torch.testing.assert_close(cuda_ops.wavefront_scan(**inputs).flatten(), expected, **EXACT)
