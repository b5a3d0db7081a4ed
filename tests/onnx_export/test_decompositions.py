"""The scans rewritten for export against the compiled ones."""

import pytest
import torch

import cuda_ops
from ssm_backbones.onnx_export import decompositions as scans
from ssm_backbones.onnx_export.override import FunctionOverrideMode

SIZES = [(1, 1), (1, 5), (6, 1), (3, 4), (5, 3), (7, 7)]


class Rewritten(FunctionOverrideMode):
    """Calls the rewritten scans in the place of the registered ones, and counts them."""

    def __init__(self):
        self.calls = 0
        super().__init__({scan: self.counted(rewritten) for scan, rewritten in scans.replacements().items()})

    def counted(self, rewritten):
        def call(*args, **kwargs):
            self.calls += 1
            return rewritten(*args, **kwargs)

        return call


def agree(call):
    expected = call()
    with Rewritten() as mode:
        found = call()
    assert mode.calls == 1
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


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


def test_groups_are_refused() -> None:
    u, delta = torch.randn(2, 2, 4, 9)
    B = C = torch.randn(2, 2, 3, 9)
    with Rewritten(), pytest.raises(NotImplementedError, match='one group'):
        cuda_ops.selective_scan(u, delta, -torch.rand(4, 3), B, C)
