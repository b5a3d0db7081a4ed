"""The scans as modules without parameters, for hooks, counters of FLOPs and symbolic tracing."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import cuda_ops
from ssm_backbones.utils.tracing import as_one_node

cross_selective_scan = as_one_node(cuda_ops.cross_selective_scan)
line_scan = as_one_node(cuda_ops.line_scan)
wavefront_scan = as_one_node(cuda_ops.wavefront_scan)


def module_inputs(*parameters: Tensor) -> tuple[Tensor, ...]:
    """Return parameters as they are to be given to a module: detached while no gradients are recorded.

    What tracks modules by hooks, PyTorch's counter of FLOPs among them, otherwise looks for their gradients even then.
    """
    return parameters if torch.is_grad_enabled() else tuple(parameter.detach() for parameter in parameters)


class CrossScan(nn.Module):
    """SS2D's four scans, :func:`cuda_ops.cross_selective_scan` of a low-rank delta."""

    def forward(
        self,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor,
        dt_bias: Tensor,
        dt_weight: Tensor,
    ) -> Tensor:
        return cross_selective_scan(x, dt, A, B, C, D, dt_bias, delta_weight=dt_weight)


class LineScan(nn.Module):
    """A scan along every row or every column, :func:`cuda_ops.line_scan` of a low-rank delta.

    Args:
        axis: 'row' or 'column'.
    """

    def __init__(self, axis: str) -> None:
        super().__init__()
        self.axis = axis

    def forward(
        self,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor | None,
        C: Tensor | None,
        D: Tensor,
        dt_bias: Tensor,
        dt_weight: Tensor,
        reverse: bool = False,
        both_ways: bool = False,
    ) -> Tensor:
        return line_scan(
            x, dt, A, B, C, D, dt_bias, True, dt_weight, axis=self.axis, reverse=reverse, both_ways=both_ways
        )

    def extra_repr(self) -> str:
        return self.axis


class WavefrontScan(nn.Module):
    """Mamba2D's scan, :func:`cuda_ops.wavefront_scan`.

    Args:
        reverse: Start from the bottom right corner instead of the upper left one.
    """

    def __init__(self, reverse: bool = False) -> None:
        super().__init__()
        self.reverse = reverse

    def forward(
        self,
        x: Tensor,
        delta_top: Tensor,
        delta_left: Tensor,
        A_top: Tensor,
        A_left: Tensor,
        B_top: Tensor,
        B_left: Tensor,
        C: Tensor,
        D: Tensor,
    ) -> Tensor:
        return wavefront_scan(x, delta_top, delta_left, A_top, A_left, B_top, B_left, C, D, reverse=self.reverse)

    def extra_repr(self) -> str:
        return f'reverse={self.reverse}'


class DotProductAttention(nn.Module):
    """``F.scaled_dot_product_attention`` of (B, heads, L, C), a module of its own for the same reasons."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value)
