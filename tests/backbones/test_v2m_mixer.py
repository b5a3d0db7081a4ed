"""V2M's mixers against loops over the pixels from each corner, and what they share and leave alone."""

import copy

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from cuda_ops import _library
from ssm_backbones.layers.calls import apply_causal_conv, apply_conv
from ssm_backbones.layers.v2m_mixer import HierarchicalV2MMixer, PlainV2MMixer

CORNERS = [(from_right, from_bottom) for from_right in (False, True) for from_bottom in (False, True)]
MIXERS = [PlainV2MMixer, HierarchicalV2MMixer]
SIZES = [(3, 5), (6, 2), (4, 1), (1, 6), (1, 1)]


def random_mixer(kind, d_state=3, dtype=torch.float64):
    layer = kind(5, inner_channels=8, d_state=d_state, dt_rank=2).to(dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


def silu(v):
    return v / (1 + torch.exp(-v))


def walk(count, backwards):
    return range(count - 1, -1, -1) if backwards else range(count)


def step_and_projection(layer, which, weight, v):
    """d of the equations, and B or C, from one pixel's projection weight; v (B, E)."""
    step, projection = (v @ weight.t()).split([layer.dt_rank, layer.d_state], dim=1)
    return torch.log1p(torch.exp(step @ layer.dt_weight[which].t() + layer.dt_bias[which])), projection


def horizontal(layer, line, weights):
    """s along a line of pixels in walking order: ``line`` holds x, ``weights`` what its step size and B come from."""
    A, h, outputs = -torch.exp(layer.A_log[0]), 0, []
    for x, v in zip(line, weights, strict=True):
        d, B = v
        h = torch.exp(d[:, :, None] * A) * h + (d * x)[:, :, None] * B[:, None, :]
        outputs.append(h.sum(2) + layer.D[0] * x)
    return outputs


def vertical(layer, line, weights):
    """y along a line of pixels in walking order."""
    A, h, outputs = -torch.exp(layer.A_log[1]), 0, []
    for s, v in zip(line, weights, strict=True):
        d, C = v
        h = torch.exp(d[:, :, None] * A) * h + (d * s)[:, :, None]
        outputs.append((h * C[:, None, :]).sum(2) + layer.D[1] * s)
    return outputs


def causal(conv, line):
    """A causal convolution of a line of pixels in walking order."""
    taps = conv.weight.flatten(1)
    outputs = []
    for i in range(len(line)):
        total = conv.bias
        for back in range(min(i + 1, taps.shape[1])):
            total = total + taps[:, taps.shape[1] - 1 - back] * line[i - back]
        outputs.append(silu(total))
    return outputs


def plain_by_loops(layer, x):
    """The plain mixer written from its equations, each corner on its own. x (B, H, W, C)."""
    batch, height, width, _ = x.shape
    u, z = (x @ layer.in_proj.weight.t()).chunk(2, dim=-1)
    gate = silu(z)
    total = {}
    for from_right, from_bottom in CORNERS:
        s = {}
        for i in range(height):
            order = [(i, j) for j in walk(width, from_right)]
            line = causal(layer.row_conv, [u[:, i, j] for i, j in order])
            weights = [step_and_projection(layer, 0, layer.x_proj[0].weight, v) for v in line]
            for (i, j), value in zip(order, horizontal(layer, line, weights), strict=True):
                s[i, j] = value * gate[:, i, j]
        for j in range(width):
            order = [(i, j) for i in walk(height, from_bottom)]
            line = causal(layer.column_conv, [s[pixel] for pixel in order])
            weights = [step_and_projection(layer, 1, layer.x_proj[1].weight, v) for v in line]
            for pixel, value in zip(order, vertical(layer, line, weights), strict=True):
                total[pixel] = total.get(pixel, 0) + value
    y = torch.stack([total[i, j] for i in range(height) for j in range(width)], 1).view(batch, height, width, -1)
    return (y / 2 * gate) @ layer.out_proj.weight.t()


def hierarchical_by_loops(layer, x):
    """The hierarchical mixer written from its equations, each corner on its own. x (B, H, W, C)."""
    batch, height, width, _ = x.shape
    u, z = (x @ layer.in_proj.weight.t()).chunk(2, dim=-1)
    gate = silu(z)
    padded = F.pad(u, (0, 0, 1, 1, 1, 1))
    u = silu(
        sum(
            padded[:, i : i + height, j : j + width] * layer.conv.weight[:, 0, i, j] for i in range(3) for j in range(3)
        )
    )
    rank, states = layer.dt_rank, layer.d_state
    steps, projections = layer.x_proj.weight.split([2 * rank, 2 * states])
    weights = [
        torch.cat([steps[k * rank : (k + 1) * rank], projections[k * states : (k + 1) * states]]) for k in (0, 1)
    ]
    total = {}
    for from_right, from_bottom in CORNERS:
        s = {}
        for i in range(height):
            order = [(i, j) for j in walk(width, from_right)]
            line = [u[:, i, j] for i, j in order]
            given = [step_and_projection(layer, 0, weights[0], v) for v in line]
            for (i, j), value in zip(order, horizontal(layer, line, given), strict=True):
                s[i, j] = value * gate[:, i, j]
        for j in range(width):
            order = [(i, j) for i in walk(height, from_bottom)]
            given = [step_and_projection(layer, 1, weights[1], u[:, i, j]) for i, j in order]
            for pixel, value in zip(order, vertical(layer, [s[pixel] for pixel in order], given), strict=True):
                total[pixel] = total.get(pixel, 0) + value
    y = torch.stack([total[i, j] for i in range(height) for j in range(width)], 1).view(batch, height, width, -1) / 2
    y = (y - y.mean(-1, keepdim=True)) / torch.sqrt(y.var(-1, unbiased=False, keepdim=True) + 1e-5)
    return ((y * layer.norm.weight + layer.norm.bias) * gate) @ layer.out_proj.weight.t()


BY_LOOPS = {PlainV2MMixer: plain_by_loops, HierarchicalV2MMixer: hierarchical_by_loops}


@pytest.mark.parametrize('kind', MIXERS)
@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('d_state', [1, 3])
def test_mixers_equal_loops_over_the_corners(kind, size, d_state):
    layer = random_mixer(kind, d_state)
    x = torch.randn(2, *size, 5, dtype=torch.float64, requires_grad=True)
    inputs = [x, *layer.parameters()]
    y, expected = layer(x), BY_LOOPS[kind](layer, x)
    torch.testing.assert_close(y, expected)
    weights = torch.randn_like(y)
    for ours, theirs in zip(
        torch.autograd.grad(y, inputs, weights), torch.autograd.grad(expected, inputs, weights), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize('kind', MIXERS)
def test_mixers_equal_loops_in_float32(kind):
    layer = random_mixer(kind, dtype=torch.float32)
    x = torch.randn(2, 4, 6, 5)
    torch.testing.assert_close(layer(x), BY_LOOPS[kind](layer, x), rtol=1e-4, atol=1e-5)


def inner_maps(height, width):
    return (torch.randn(2, height, width, 8, dtype=torch.float64), torch.rand(2, height, width, 8, dtype=torch.float64))


@pytest.mark.parametrize('kind', MIXERS)
@pytest.mark.parametrize(('from_right', 'from_bottom'), CORNERS)
@pytest.mark.parametrize('pixel', [(2, 3), (0, 0), (4, 6)])
def test_an_impulse_fills_exactly_the_quadrant_behind_it(kind, from_right, from_bottom, pixel):
    layer = random_mixer(kind)
    x, gate = inner_maps(5, 7)
    changed = x.clone()
    changed[0, pixel[0], pixel[1]] += 1
    with torch.no_grad():
        response = (
            (layer.corner(changed, gate, from_right, from_bottom) - layer.corner(x, gate, from_right, from_bottom))
            .abs()
            .amax(-1)
        )
    rows, columns = torch.arange(5)[:, None], torch.arange(7)[None, :]
    reached = (rows <= pixel[0] if from_bottom else rows >= pixel[0]) & (
        columns <= pixel[1] if from_right else columns >= pixel[1]
    )
    assert torch.equal(response[0] > 1e-12, reached)
    assert (response[1] == 0).all()


def test_the_output_is_half_the_corners_sum():
    layer = random_mixer(PlainV2MMixer)
    x = torch.randn(2, 4, 6, 5, dtype=torch.float64)
    u, gate = layer.project_in(x)
    y = sum(layer.corner(u, gate, *corner) for corner in CORNERS) / 2
    torch.testing.assert_close(layer(x), layer.out_proj(y * gate))

    layer = random_mixer(HierarchicalV2MMixer)
    u, gate = layer.project_in(x)
    u = F.silu(apply_conv(layer.conv, u))
    y = sum(layer.corner(u, gate, *corner) for corner in CORNERS) / 2
    torch.testing.assert_close(layer(x), layer.out_proj(layer.norm(y) * gate))


@pytest.mark.parametrize('kind', MIXERS)
@pytest.mark.parametrize('dims', [(2,), (1,), (1, 2)])
def test_a_mirrored_map_gives_the_mirrored_map(kind, dims):
    layer = random_mixer(kind)
    twin = copy.deepcopy(layer)
    if kind is HierarchicalV2MMixer:
        # The corners share all weights; only the 3x3 window has a left and a right.
        twin.conv.weight.data = layer.conv.weight.data.flip([dim + 1 for dim in dims])
    x = torch.randn(1, 5, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(twin(x.flip(dims)).flip(dims), layer(x))


@pytest.mark.parametrize('kind', MIXERS)
def test_rows_come_before_columns(kind):
    layer = random_mixer(kind)
    x = torch.randn(1, 4, 4, 5, dtype=torch.float64)
    assert not torch.allclose(layer(x.transpose(1, 2)).transpose(1, 2), layer(x))


@pytest.mark.parametrize('kind', MIXERS)
def test_samples_do_not_touch_each_other(kind):
    layer = random_mixer(kind)
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64)
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(layer(x[order]), layer(x)[order])
    assert layer(x[:0]).shape == (0, 4, 5, 5)


class Record(TorchDispatchMode):
    """Notes every operator, and how many elements its first tensor has."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [value for value in args if isinstance(value, torch.Tensor)]
        self.calls.append((func._schema.name, tensors[0].numel() if tensors else 0))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ('kind', 'scans', 'calls'),
    [
        (PlainV2MMixer, 6, {'row_conv': 2, 'x_proj.0': 2, 'column_conv': 4, 'x_proj.1': 4}),
        (HierarchicalV2MMixer, 2 if _library.STATUS.compiled else 4, {'conv': 1, 'x_proj': 1}),
    ],
)
def test_corners_share_work_and_reorder_no_map(kind, scans, calls):
    layer = random_mixer(kind, dtype=torch.float32)
    x = torch.randn(1, 30, 31, 5)
    with torch.no_grad(), Record() as record:
        expected = layer(x)
    counted = dict.fromkeys(calls, 0)
    for name in calls:

        def count(*_, name=name):
            counted[name] += 1

        layer.get_submodule(name).register_forward_hook(count)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected)
    assert counted == calls
    assert [name for name, _ in record.calls].count('cuda_ops::route_scan') == scans
    reordering = {'aten::flip', 'aten::clone', 'aten::copy_', 'aten::cat', 'aten::stack', 'aten::roll', 'aten::index'}
    assert [call for call in record.calls if call[0] in reordering and call[1] >= 30 * 31 * 8] == []


@pytest.mark.parametrize('axis', ['row', 'column'])
@pytest.mark.parametrize('size', [(3, 7), (1, 1), (2, 9), (9, 2)])
def test_causal_convolutions_look_back_only(axis, size):
    conv = torch.nn.Conv1d(4, 4, kernel_size=4, padding=3, groups=4).double()
    x = torch.randn(2, *size, 4, dtype=torch.float64)
    dim = 2 if axis == 'row' else 1
    line = x.movedim(dim, 0)
    expected = torch.stack(
        [
            conv.bias + sum(conv.weight.flatten(1)[:, 3 - k] * line[i - k] for k in range(min(i + 1, 4)))
            for i in range(len(line))
        ]
    ).movedim(0, dim)
    for _ in range(2):
        torch.testing.assert_close(apply_causal_conv(conv, x, axis), expected)
        torch.testing.assert_close(apply_causal_conv(conv, x.flip(dim), axis, reverse=True).flip(dim), expected)
        # Once computed from the weights, once by calling the layer, which a hook sees.
        conv.register_forward_hook(lambda *_: None)
