"""Pool adaptively in operators that serve sizes unknown until run time, which ONNX's own pooling does not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def adaptive_average_pool(x: Tensor, output_size: int | Sequence[int | None]) -> Tensor:
    """Compute what ``torch.nn.functional.adaptive_avg_pool2d`` does, as two products with the cells' weights.

    Args:
        x: (..., H, W), floating-point.
        output_size: How many cells, down and across, or both; None keeps the positions. Cell k of K averages the
            positions from ``floor(k * H / K)`` to, excluded, ``ceil((k + 1) * H / K)``.
    """
    down, across = (output_size, output_size) if isinstance(output_size, int) else output_size
    if down is not None:
        x = _weights(x, -2, down) @ x
    return x if across is None else x @ _weights(x, -1, across).transpose(0, 1)


def _weights(x: Tensor, dim: int, cells: int) -> Tensor:
    """Compute how much each position along a dimension counts in each cell: (cells, positions)."""
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
