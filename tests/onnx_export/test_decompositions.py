"""The scans rewritten for export against the compiled ones."""

import pytest
import torch

import cuda_ops
from ssm_backbones.export import decompositions
from ssm_backbones.onnx_export import decompositions as scans
from ssm_backbones.onnx_export import loop_free
from ssm_backbones.onnx_export.override import FunctionOverrideMode

SIZES = [(1, 1), (1, 5), (6, 1), (3, 4), (5, 3), (7, 7)]


class Rewritten(FunctionOverrideMode):
    """Calls the rewritten scans in the place of the registered ones, and counts them."""

    def __init__(self, loops=True):
        self.calls = 0
        super().__init__({scan: self.counted(rewritten) for scan, rewritten in scans.replacements(loops).items()})

    def counted(self, rewritten):
        def call(*args, **kwargs):
            self.calls += 1
            return rewritten(*args, **kwargs)

        return call


def agree(call):
    expected = call()
    for loops in (True, False):
        with Rewritten(loops) as mode:
            found = call()
        assert mode.calls == 1
        for ours, theirs in zip(
            *((each,) if isinstance(each, torch.Tensor) else each for each in (found, expected)), strict=True
        ):
            # Sums of terms of both signs are rounded at their terms' size.
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6 * max(1.0, theirs.abs().max().item()))


@pytest.mark.parametrize('states', [1, 3])
@pytest.mark.parametrize('size', SIZES)
def test_cross_selective_scan(size, states) -> None:
    x, delta = torch.randn(2, *size, 5), torch.randn(2, *size, 4, 5)
    B, C = torch.randn(2, 2, *size, 4, states)
    A, D, bias = -torch.rand(4, 5, states), torch.randn(4, 5), torch.randn(4, 5)
    agree(lambda: cuda_ops.cross_selective_scan(x, delta, A, B, C, D, bias))
    agree(lambda: cuda_ops.cross_selective_scan(x, delta.abs(), A, B, C, delta_softplus=False))
    weight = torch.randn(4, 5, 3)
    agree(lambda: cuda_ops.cross_selective_scan(x, delta[..., :3], A, B, C, D, bias, delta_weight=weight))


@pytest.mark.parametrize('reverse', [False, True])
@pytest.mark.parametrize('axis', ['row', 'column'])
@pytest.mark.parametrize('size', SIZES)
def test_line_scan(size, axis, reverse) -> None:
    x, delta = torch.randn(2, 2, *size, 5)
    B, C = torch.randn(2, 2, *size, 3)
    A, D, bias = -torch.rand(5, 3), torch.randn(5), torch.randn(5)
    agree(lambda: cuda_ops.line_scan(x, delta, A, B, None, D, bias, axis=axis, reverse=reverse))
    agree(lambda: cuda_ops.line_scan(x, delta, A, None, C, axis=axis, reverse=reverse))
    weight = torch.randn(5, 3)
    agree(lambda: cuda_ops.line_scan(x, C, A, B, None, delta_weight=weight, axis=axis, reverse=reverse))


@pytest.mark.parametrize('reverse', [False, True])
@pytest.mark.parametrize('size', SIZES)
def test_wavefront_scan(size, reverse) -> None:
    x, *deltas = torch.randn(3, 2, *size, 5)
    rates = -torch.rand(2, 5, 3)
    projections = torch.randn(3, 2, *size, 3)
    deltas = [torch.nn.functional.softplus(delta) for delta in deltas]
    for D in (torch.randn(5), None):
        agree(lambda D=D: cuda_ops.wavefront_scan(x, *deltas, *rates, *projections, D, reverse=reverse))


def test_selective_scan_with_its_last_state() -> None:
    u, delta = torch.randn(2, 2, 5, 9)
    B, C = torch.randn(2, 2, 3, 9)
    A = -torch.rand(5, 3)
    agree(lambda: cuda_ops.selective_scan(u, delta, A, B, C, return_last_state=True, delta_softplus=True))


@pytest.mark.parametrize('reverse', [False, True])
@pytest.mark.parametrize('length', [1, 32, 33, 64, 1000])
def test_recurrence_without_a_loop(length, reverse) -> None:
    """With decays of every size, among them those that underflow."""
    decay = torch.exp(-(10 ** torch.empty(length, 3).uniform_(-6, 3)))
    decay[::7] = 0
    decay[1::5] = 1
    inflow = torch.randn(length, 3)
    exact = torch.ops.ssm_export.line(decay.double(), inflow.double(), reverse)
    found = loop_free.line(decay, inflow, reverse)
    # Both round in the same places but for products of decays.
    assert (found - exact).abs().max() <= 1e-6 * exact.abs().max() * max(1, length / 100)


class Scans(torch.nn.Module):
    """A scan of each kind, from a map that gives all their inputs."""

    def forward(self, x):
        delta, A = x[:, :, :, None].expand(-1, -1, -1, 4, -1), -torch.ones(4, 3, 2)
        y = cuda_ops.cross_selective_scan(x, delta, A, delta[..., :2], delta[..., 1:])
        y = y + cuda_ops.line_scan(x, x, A[0], None, x[..., :2], axis='column', reverse=True)
        return y + cuda_ops.wavefront_scan(x, x.abs(), x.abs(), A[0], A[1], x[..., :2], x[..., 1:], x[..., :2])


def decomposed(module, x, sizes=None):
    program = torch.export.export(module, (x,), dynamic_shapes=sizes and (sizes,), strict=False)
    return program.run_decompositions(decompositions())


def check_operators(program) -> None:
    """PyTorch's own, computing on tensors of at most five dimensions, which all runtimes have."""
    namespaces = {each.namespace for node in program.graph.nodes if hasattr(each := node.target, 'namespace')}
    assert namespaces == {'aten'}
    assert max(getattr(node.meta.get('val'), 'ndim', 0) for node in program.graph.nodes) == 5


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
def test_programs_have_no_operator_of_ours(dtype) -> None:
    x = torch.randn(2, 6, 7, 3).to(dtype)
    program = decomposed(Scans(), x)
    check_operators(program)
    close = dict(rtol=1e-5, atol=1e-5) if dtype == torch.float32 else dict(rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(program.module()(x), Scans()(x), **close)


class Mean(torch.nn.Module):
    """A mean of two directions, the first of them detached, which becomes an alias."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def forward(self, x):
        return torch.lerp(x.detach(), x.flip(0), self.weight)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize('weight', [0.25, 0.5, 1.0])
def test_programs_choose_no_formula_by_a_scalar(weight, dtype) -> None:
    """Core ML's converter has no conversion of that, nor of aten.alias."""
    # The difference of the large numbers overflows in float16; beside the largest one, 1 is lost in float32.
    large = 6e4 if dtype == torch.float16 else 1e8
    x = torch.tensor([[large, large, -3.0], [2.0, 1.0, 0.1], [1.0, -large, 5.0]]).to(dtype)
    program = torch.export.export(Mean(weight), (x,)).run_decompositions(
        {**torch.export.default_decompositions(), **decompositions()}
    )
    targets = {str(node.target) for node in program.graph.nodes}
    assert not targets & {'aten.where.self', 'aten.lerp.Scalar', 'aten.alias.default'}, targets
    torch.testing.assert_close(program.module()(x), Mean(weight)(x))


class Enlarge(torch.nn.Module):
    """A nearest-neighbour resize to a size, or by factors."""

    def __init__(self, size=None, factors=None):
        super().__init__()
        self.size, self.factors = size, factors

    def forward(self, x):
        return torch.nn.functional.interpolate(x, self.size, self.factors)


@pytest.mark.parametrize(
    'given, stays',
    [
        (dict(size=(8, 14)), True),
        (dict(size=(7, 14)), False),
        (dict(factors=(2.0, 3.0)), True),
        (dict(factors=(1.75, 2.0)), False),
        (dict(factors=(2.1, 1.1)), False),
        (dict(size=(2, 3)), False),
    ],
    ids=str,
)
def test_nearest_neighbours_by_no_whole_factor(given, stays) -> None:
    """LiteRT's converter takes other pixels there."""
    x = torch.arange(2 * 3 * 4 * 7.0).view(2, 3, 4, 7)
    program = torch.export.export(Enlarge(**given), (x,)).run_decompositions(
        {**torch.export.default_decompositions(), **decompositions()}
    )
    assert any('upsample' in str(node.target) for node in program.graph.nodes) == stays
    assert torch.equal(program.module()(x), Enlarge(**given)(x))


class EnlargeTo(torch.nn.Module):
    """A nearest-neighbour resize of one map to another one's size, as in an FPN."""

    def forward(self, x, finer):
        return torch.nn.functional.interpolate(x, finer.shape[2:])


def test_nearest_neighbours_of_open_sizes_stay() -> None:
    """Indices of open sizes would be computed by Python's division, which OpenVINO does not take."""
    x, finer = torch.randn(1, 2, 4, 5), torch.randn(1, 2, 7, 9)
    sides = {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    program = torch.export.export(EnlargeTo(), (x, finer), dynamic_shapes=(sides, sides))
    program = program.run_decompositions({**torch.export.default_decompositions(), **decompositions()})
    assert torch.ops.aten.upsample_nearest2d.vec in {node.target for node in program.graph.nodes}
    for size in ((7, 9), (8, 10), (13, 6)):
        finer = torch.randn(1, 2, *size)
        assert torch.equal(program.module()(x, finer), EnlargeTo()(x, finer))


@pytest.mark.parametrize(
    'conv',
    [
        torch.nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2),
        torch.nn.Conv1d(4, 6, 3, padding='same', bias=False),
        torch.nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, output_padding=1),
        torch.nn.Conv2d(4, 6, 3, stride=2),
    ],
    ids=str,
)
@pytest.mark.parametrize('batch', [True, False])
def test_no_convolution_has_one_dimension(conv, batch) -> None:
    """ExecuTorch's XNNPACK takes no weight of such twice."""
    shape = (2, 4, 9) if conv.weight.ndim == 3 else (2, 4, 9, 7)
    x = torch.randn(shape if batch else shape[1:])
    program = torch.export.export(conv, (x,)).run_decompositions(
        {**torch.export.default_decompositions(), **decompositions()}
    )
    convolutions = [node for node in program.graph.nodes if 'conv' in str(node.target)]
    assert len(convolutions) == 1 and convolutions[0].args[1].meta['val'].ndim == 4
    torch.testing.assert_close(program.module()(x), conv(x))


@pytest.mark.parametrize('routes', [[1], [3], [1, 3], [0, 3]], ids=str)
def test_last_states_of_reversed_routes(routes) -> None:
    count = len(routes)
    x, delta, A = torch.randn(2, 4, 5, 6), torch.rand(2, 4, 5, count, 6), -torch.rand(count, 6, 3)
    B, C = torch.randn(2, 2, 4, 5, count, 1, 3)
    given = (x, delta, A, B, C, torch.randn(count, 6), torch.randn(count, 6), routes, False, True, 0)
    y, last = torch.ops.cuda_ops.route_scan(*given)[:2]
    for line in (torch.ops.ssm_export.line, loop_free.line):
        found = scans.route_scan(*given, line=line)
        torch.testing.assert_close(found[0], y, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found[1], last, rtol=1e-5, atol=1e-5)


def test_no_first_dimension_is_reversed() -> None:
    """MNN 3.6.1 fails there."""
    x = torch.randn(2, 6, 7, 3)
    flips = [node.args[1] for node in decomposed(Scans(), x).graph.nodes if node.target == torch.ops.aten.flip.default]
    assert flips and all(dims != [0] for dims in flips), flips


class Line(torch.nn.Module):
    def __init__(self, axis='column'):
        super().__init__()
        self.axis = axis

    def forward(self, x):
        return cuda_ops.line_scan(x, x, -torch.ones(3, 2), None, x[..., :2], axis=self.axis, reverse=True)


@pytest.mark.parametrize('length', [7, 40])
@pytest.mark.parametrize('axis', ['row', 'column'])
def test_no_line_is_reversed(axis, length) -> None:
    """MNN 3.6.1 fails there."""
    x = torch.randn(2, length, length, 3)
    program = decomposed(Line(axis), x)
    assert torch.ops.aten.flip.default not in {node.target for node in program.graph.nodes}
    torch.testing.assert_close(program.module()(x), Line(axis)(x), rtol=1e-5, atol=1e-6)


# More positions than are unrolled: two levels of chunks.
@pytest.mark.parametrize(
    'module, most', [(Line(), 40), pytest.param(Scans(), 12, marks=pytest.mark.slow)], ids=['line', 'all']
)
def test_open_sizes(module, most) -> None:
    bounded = torch.export.Dim.DYNAMIC(max=most)
    program = decomposed(module, torch.randn(2, 6, 7, 3), {0: torch.export.Dim.DYNAMIC, 1: bounded, 2: bounded})
    check_operators(program)
    for batch, height, width in ((1, most, most), (3, 2, 9), (2, 8, 8), (2, 12, 7)):
        x = torch.randn(batch, height, width, 3)
        torch.testing.assert_close(program.module()(x), module(x), rtol=1e-5, atol=1e-5)


def test_open_sizes_need_a_bound() -> None:
    with pytest.raises(NotImplementedError, match=r"upper bound.*Dim\('height', max=512\)"):
        decomposed(Line(), torch.randn(2, 6, 7, 3), {1: torch.export.Dim.DYNAMIC})


def test_a_sequence_of_one_group_has_no_axis_of_groups() -> None:
    class Sequence(torch.nn.Module):
        def forward(self, u):
            return cuda_ops.selective_scan(u, u, -torch.ones(3, 2), u[:, :2], u[:, 1:])

    u = torch.randn(2, 3, 9)
    program = decomposed(Sequence(), u)
    check_operators(program)
    torch.testing.assert_close(program.module()(u), Sequence()(u), rtol=1e-5, atol=1e-5)


def test_groups_are_refused() -> None:
    u, delta = torch.randn(2, 2, 4, 9)
    B = C = torch.randn(2, 2, 3, 9)
    with Rewritten(), pytest.raises(NotImplementedError, match='one group'):
        cuda_ops.selective_scan(u, delta, -torch.rand(4, 3), B, C)
