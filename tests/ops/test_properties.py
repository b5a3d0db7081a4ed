"""Relations between the scans that follow from their equations."""

import pytest
import torch

import cuda_ops
from tests.ops.route_cases import Cross, Lines, Sequence

EXACT = dict(rtol=1e-12, atol=1e-12)


def inputs_of(case):
    return {name: value for name, value in case.inputs().items() if value is not None}


@pytest.mark.parametrize(('axis', 'dim'), (('row', 2), ('column', 1)))
def test_reverse_is_a_flip_before_and_after(axis: str, dim: int) -> None:
    inputs = inputs_of(Lines(2, 5, 7, 6, 3, axis))
    flipped = {name: value.flip(dim) if value.dim() == 4 else value for name, value in inputs.items()}
    torch.testing.assert_close(
        cuda_ops.line_scan(**inputs, axis=axis, reverse=True),
        cuda_ops.line_scan(**flipped, axis=axis).flip(dim),
        **EXACT,
    )


def test_transposition_swaps_rows_and_columns() -> None:
    inputs = inputs_of(Lines(2, 5, 7, 6, 3, 'row'))
    turned = {name: value.transpose(1, 2) if value.dim() == 4 else value for name, value in inputs.items()}
    for reverse in (False, True):
        y = cuda_ops.line_scan(**turned, axis='column', reverse=reverse).transpose(1, 2)
        torch.testing.assert_close(cuda_ops.line_scan(**inputs, axis='row', reverse=reverse), y, **EXACT)


def test_transposition_swaps_the_routes_of_a_cross_scan() -> None:
    inputs = inputs_of(Cross(2, 5, 7, 6, 3))
    swap = [1, 0, 3, 2]
    turned = {'x': inputs['x'].transpose(1, 2)}
    turned |= {name: inputs[name].transpose(1, 2)[:, :, :, swap] for name in ('delta', 'B', 'C')}
    turned |= {name: inputs[name][swap] for name in ('A', 'D', 'delta_bias')}
    torch.testing.assert_close(
        cuda_ops.cross_selective_scan(**inputs), cuda_ops.cross_selective_scan(**turned).transpose(1, 2), **EXACT
    )


def test_turning_the_map_round_reverses_the_routes_of_a_cross_scan() -> None:
    inputs = inputs_of(Cross(2, 5, 7, 6, 3))
    order = [2, 3, 0, 1]
    turned = {'x': inputs['x'].flip(1, 2)}
    turned |= {name: inputs[name].flip(1, 2)[:, :, :, order] for name in ('delta', 'B', 'C')}
    turned |= {name: inputs[name][order] for name in ('A', 'D', 'delta_bias')}
    torch.testing.assert_close(
        cuda_ops.cross_selective_scan(**inputs), cuda_ops.cross_selective_scan(**turned).flip(1, 2), **EXACT
    )


def sequences_of(grid: torch.Tensor, k: int) -> torch.Tensor:
    """A grid (B, H, W, ...) as (B, ..., L) in the order of route k."""
    grid = grid.transpose(1, 2) if k % 2 else grid
    sequence = grid.flatten(1, 2).movedim(1, -1)
    return sequence.flip(-1) if k >= 2 else sequence


@pytest.mark.parametrize('softplus', (False, True))
def test_a_cross_scan_is_four_selective_scans(softplus: bool) -> None:
    inputs = inputs_of(Cross(2, 5, 7, 6, 3, softplus=softplus))
    total = torch.zeros_like(inputs['x'])
    for k in range(4):
        y = cuda_ops.selective_scan(
            sequences_of(inputs['x'], k),
            sequences_of(inputs['delta'][:, :, :, k], k),
            inputs['A'][k],
            sequences_of(inputs['B'][:, :, :, k], k),
            sequences_of(inputs['C'][:, :, :, k], k),
            inputs['D'][k],
            delta_bias=inputs['delta_bias'][k],
            delta_softplus=softplus,
        )
        y = y.flip(-1) if k >= 2 else y
        y = y.unflatten(-1, (7, 5)).transpose(-1, -2) if k % 2 else y.unflatten(-1, (5, 7))
        total += y.permute(0, 2, 3, 1)
    torch.testing.assert_close(cuda_ops.cross_selective_scan(**inputs, delta_softplus=softplus), total, **EXACT)


@pytest.mark.parametrize('reverse', (False, True))
@pytest.mark.parametrize('axis', ('row', 'column'))
def test_a_line_scan_is_a_selective_scan_of_each_line(axis: str, reverse: bool) -> None:
    inputs = inputs_of(Lines(2, 5, 7, 6, 3, axis))
    y = cuda_ops.line_scan(**inputs, axis=axis, reverse=reverse)
    for line in range(5 if axis == 'row' else 7):
        maps = {name: inputs[name].select(1 if axis == 'row' else 2, line).mT for name in ('x', 'delta', 'B', 'C')}
        maps = {name: value.flip(-1) if reverse else value for name, value in maps.items()}
        expected = cuda_ops.selective_scan(
            maps['x'],
            maps['delta'],
            inputs['A'],
            maps['B'],
            maps['C'],
            inputs['D'],
            delta_bias=inputs['delta_bias'],
            delta_softplus=True,
        )
        expected = expected.flip(-1) if reverse else expected
        torch.testing.assert_close(y.select(1 if axis == 'row' else 2, line).mT, expected, **EXACT)


def test_a_batch_is_its_images() -> None:
    inputs = inputs_of(Cross(3, 5, 7, 18, 2))
    y = cuda_ops.cross_selective_scan(**inputs)
    order = [2, 0, 1]
    permuted = {name: value[order] if name in ('x', 'delta', 'B', 'C') else value for name, value in inputs.items()}
    assert torch.equal(cuda_ops.cross_selective_scan(**permuted), y[order])
    for image in range(3):
        alone = {
            name: value[image : image + 1] if name in ('x', 'delta', 'B', 'C') else value
            for name, value in inputs.items()
        }
        assert torch.equal(cuda_ops.cross_selective_scan(**alone), y[image : image + 1])


def test_without_decay_the_state_is_a_cumulative_sum() -> None:
    u, delta = torch.randn(2, 5, 90, dtype=torch.float64), torch.rand(2, 5, 90, dtype=torch.float64)
    ones = torch.ones(2, 1, 90, dtype=torch.float64)
    y, last = cuda_ops.selective_scan(u, delta, torch.zeros(5, 1), ones, ones, return_last_state=True)
    torch.testing.assert_close(y, (delta * u).cumsum(-1), **EXACT)
    torch.testing.assert_close(last[..., 0], (delta * u).sum(-1), **EXACT)


def test_with_no_step_only_the_skip_is_left() -> None:
    inputs = inputs_of(Cross(2, 5, 7, 18, 2, bias=False))
    inputs['delta'] = torch.zeros_like(inputs['delta'])
    y = cuda_ops.cross_selective_scan(**inputs, delta_softplus=False)
    torch.testing.assert_close(y, inputs['x'] * inputs['D'].sum(0), **EXACT)


def test_without_memory_positions_do_not_mix() -> None:
    """With decays that vanish a line scan is pointwise."""
    inputs = inputs_of(Lines(1, 4, 5, 3, 2, 'row', bias=False))
    inputs['A'] = torch.full_like(inputs['A'], -1e6)
    d = torch.nn.functional.softplus(inputs['delta'])
    expected = (inputs['C'] * inputs['B']).sum(-1, keepdim=True) * d * inputs['x'] + inputs['D'] * inputs['x']
    torch.testing.assert_close(cuda_ops.line_scan(**inputs, axis='row'), expected, **EXACT)


def test_the_last_state_continues_the_sequence() -> None:
    """A sequence scanned in two parts: the second part adds what the first one's state decays to."""
    inputs = inputs_of(Sequence(2, 4, 30, 3, bias=False, D=False, softplus=False))
    first = {name: value[..., :12] if value.dim() == 3 else value for name, value in inputs.items()}
    second = {name: value[..., 12:] if value.dim() == 3 else value for name, value in inputs.items()}
    whole, last = cuda_ops.selective_scan(**inputs, return_last_state=True)
    y1, state = cuda_ops.selective_scan(**first, return_last_state=True)
    y2, rest = cuda_ops.selective_scan(**second, return_last_state=True)
    decay = torch.exp(second['delta'].cumsum(-1).unsqueeze(2) * inputs['A'].unsqueeze(-1))
    carried = decay * state.unsqueeze(-1)
    y2 = y2 + (second['C'].unsqueeze(1) * carried).sum(2)
    torch.testing.assert_close(torch.cat([y1, y2], dim=-1), whole, **EXACT)
    torch.testing.assert_close(rest + carried[..., -1], last, **EXACT)


def test_constant_projections_equal_varying_ones_of_the_same_values() -> None:
    inputs = inputs_of(Sequence(2, 6, 20, 3, B=0, C=0, z=True))
    varying = inputs | {name: inputs[name].unsqueeze(0).unsqueeze(-1).expand(2, 6, 3, 20) for name in 'BC'}
    for got, expected in zip(
        cuda_ops.selective_scan(**inputs, return_last_state=True),
        cuda_ops.selective_scan(**varying, return_last_state=True),
        strict=True,
    ):
        torch.testing.assert_close(got, expected, **EXACT)
