"""Pooling rewritten for export against PyTorch's own."""

import pytest
import torch
from torch.nn import functional as F

from ssm_backbones.onnx_export.override import FunctionOverrideMode
from ssm_backbones.onnx_export.pooling import adaptive_average_pool, replacements


@pytest.mark.parametrize('size', [(1, 1), (2, 3), (7, 4), (16, 31), (6, 6)])
@pytest.mark.parametrize('cells', [(1, 1), (2, 2), (3, 6), (5, 3), 2, (None, 3), (3, None)])
def test_adaptive_average_pool(size, cells) -> None:
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    torch.testing.assert_close(adaptive_average_pool(x, cells), F.adaptive_avg_pool2d(x, cells))


def test_no_pooling_is_left_in_a_program_of_open_sizes() -> None:
    module = torch.nn.AdaptiveAvgPool2d(3)
    open_sizes = ({2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC},)
    with FunctionOverrideMode(replacements()):
        program = torch.export.export(module, (torch.randn(2, 4, 9, 7),), dynamic_shapes=open_sizes, strict=False)
    assert not any('pool' in str(node.target) for node in program.graph.nodes)
    x = torch.randn(2, 4, 2, 5)
    torch.testing.assert_close(program.module()(x), module(x))
