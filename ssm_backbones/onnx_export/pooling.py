"""Adaptive average pooling in operators that support dynamic sizes, which ONNX's own pooling does not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def adaptive_average_pool(x: Tensor, output_size: int | Sequence[int | None]) -> Tensor:
    """Compute ``torch.nn.functional.adaptive_avg_pool2d`` as two products with the cells' weights.

    Args:
        x: Floating-point tensor (..., H, W).
        output_size: Number of cells along height and width, or one number for both; None keeps the size. Cell k of K
            averages the positions from ``floor(k * H / K)`` to ``ceil((k + 1) * H / K)``, excluded.
    """
    down, across = (output_size, output_size) if isinstance(output_size, int) else output_size
    if down is not None:
        x = _weights(x, -2, down) @ x
    return x if across is None else x @ _weights(x, -1, across).transpose(0, 1)


def _weights(x: Tensor, dim: int, cells: int) -> Tensor:
    """Compute the weight of each position along a dimension in each cell: (cells, positions)."""
    length = x.shape[dim]
    numbers = torch.arange(cells, device=x.device)[:, None]
    start = torch.div(numbers * length, cells, rounding_mode='floor')
    end = torch.div((numbers + 1) * length + cells - 1, cells, rounding_mode='floor')
    positions = torch.arange(length, device=x.device)
    inside = torch.logical_and(positions >= start, positions < end)
    return inside.to(x.dtype) / (end - start).to(x.dtype)


def replacements() -> dict[Any, Callable[..., Any]]:
    """Map the pooling to its replacement, for :class:`ssm_backbones.onnx_export.override.FunctionOverrideMode`."""
    return {F.adaptive_avg_pool2d: adaptive_average_pool}
