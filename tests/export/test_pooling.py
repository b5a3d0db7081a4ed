"""Pooling rewritten for export against PyTorch's own."""

import pytest
import torch
from torch.nn import functional as F

from ssm_backbones.export.pooling import adaptive_average_pool


@pytest.mark.parametrize('size', [(1, 1), (2, 3), (7, 4), (16, 31), (6, 6)])
@pytest.mark.parametrize('cells', [(1, 1), (2, 2), (3, 6), (5, 3)])
def test_adaptive_average_pool(size, cells) -> None:
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    torch.testing.assert_close(adaptive_average_pool(x, cells), F.adaptive_avg_pool2d(x, cells))
