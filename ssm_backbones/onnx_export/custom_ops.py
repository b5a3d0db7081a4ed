"""The scans as one operator each, in the domain ``ssm_backbones``, for runtimes that the compiled scans were built for.

Inputs are contiguous, all are given, and one that no call varies over the map has size 1 there::

    RouteScan(x, delta, A, B, C, D, delta_bias; routes, per_line, delta_softplus) -> y
        x, y (B, H, W, E); delta (K, B, H, W, E); A (K, E, N); B, C (B, H, W, K, N); D, delta_bias (K, E)
    WavefrontScan(x, delta_top, delta_left, A_top, A_left, B_top, B_left, C, D; reverse) -> y
        x, y and both deltas (B, H, W, E); A_top, A_left (E, N); B_top, B_left, C (B, H, W, N); D (E)

``cuda_ops/runtimes`` holds their kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx
import torch
from onnxscript import values
from torch import Tensor

from cuda_ops.route_reference import low_rank_delta
from ssm_backbones.onnx_export.decompositions import of_one_group

DOMAIN = 'ssm_backbones'
ROUTE_SCAN = ('x', 'delta', 'A', 'B', 'C', 'D', 'delta_bias')
WAVEFRONT_SCAN = ('x', 'delta_top', 'delta_left', 'A_top', 'A_left', 'B_top', 'B_left', 'C', 'D')

_LIBRARY = torch.library.Library('ssm_export', 'FRAGMENT')
_LIBRARY.define(
    f'route_scan({", ".join(f"Tensor {name}" for name in ROUTE_SCAN)}, int[] routes, bool per_line, '
    'bool delta_softplus) -> Tensor'
)
_LIBRARY.define(f'wavefront_scan({", ".join(f"Tensor {name}" for name in WAVEFRONT_SCAN)}, bool reverse) -> Tensor')


@torch.library.impl('ssm_export::route_scan', 'CompositeExplicitAutograd', lib=_LIBRARY)
def _(x, delta, A, B, C, D, delta_bias, routes, per_line, delta_softplus):
    grid = (*x.shape[:3], -1, -1)
    B, C = (value.expand(grid).unsqueeze(4) for value in (B, C))
    arguments = (x, delta.permute(1, 2, 3, 0, 4), A, B, C, D, delta_bias, routes, per_line, delta_softplus, 0)
    return torch.ops.cuda_ops.route_scan(*arguments)[0]


@torch.library.impl('ssm_export::wavefront_scan', 'CompositeExplicitAutograd', lib=_LIBRARY)
def _(x, delta_top, delta_left, A_top, A_left, B_top, B_left, C, D, reverse):
    arguments = (x, delta_top, delta_left, A_top, A_left, B_top, B_left, C, D, reverse, 0)
    return torch.ops.cuda_ops.wavefront_scan(*arguments)[0]


def _like_x(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


for _name in ('route_scan', 'wavefront_scan'):
    torch.library.register_fake(f'ssm_export::{_name}', _like_x, lib=_LIBRARY)


def _route_scan(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor | None,
    C: Tensor | None,
    D: Tensor | None,
    delta_bias: Tensor | None,
    routes: list[int],
    per_line: bool,
    delta_softplus: bool,
    chunk: int,
    delta_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    B, C = of_one_group(B), of_one_group(C)
    if delta_weight is not None:
        delta = low_rank_delta(delta, delta_weight)
    B, C = (A.new_ones(1, 1, 1, A.shape[0], A.shape[2]) if value is None else value.float() for value in (B, C))
    D, delta_bias = (A.new_zeros(A.shape[:2]) if value is None else value for value in (D, delta_bias))
    routes_first = delta.permute(3, 0, 1, 2, 4).float()
    y = torch.ops.ssm_export.route_scan(
        x.float(), routes_first, A, B, C, D, delta_bias, routes, per_line, delta_softplus
    )
    # A graph has no use for last states: functions that return them are not exported so.
    nothing = x.new_empty((0,))
    return y.to(x.dtype), nothing, nothing


def _wavefront_scan(
    x: Tensor,
    delta_top: Tensor,
    delta_left: Tensor,
    A_top: Tensor,
    A_left: Tensor,
    B_top: Tensor,
    B_left: Tensor,
    C: Tensor,
    D: Tensor | None,
    reverse: bool,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    D = A_top.new_zeros(A_top.shape[:1]) if D is None else D
    maps = (value.float() for value in (x, delta_top, delta_left, A_top, A_left, B_top, B_left, C, D))
    nothing = x.new_empty((0,))
    return torch.ops.ssm_export.wavefront_scan(*maps, reverse).to(x.dtype), nothing, nothing


def replacements() -> dict[Any, Callable[..., Any]]:
    """Map the scans to the operators, for :class:`ssm_backbones.onnx_export.override.FunctionOverrideMode`."""
    return {
        torch.ops.cuda_ops.route_scan: _route_scan,
        torch.ops.cuda_ops.wavefront_scan: _wavefront_scan,
    }


def translations() -> dict[Any, Callable[..., Any]]:
    """Return the operators in ONNX, for ``torch.onnx.export(custom_translation_table=...)``."""
    route_scan = _operator('RouteScan', ROUTE_SCAN)
    wavefront_scan = _operator('WavefrontScan', WAVEFRONT_SCAN)

    def route(x, delta, A, B, C, D, delta_bias, routes, per_line, delta_softplus):
        inputs = (x, delta, A, B, C, D, delta_bias)
        return route_scan(*inputs, routes=routes, per_line=int(per_line), delta_softplus=int(delta_softplus))

    def wavefront(x, delta_top, delta_left, A_top, A_left, B_top, B_left, C, D, reverse):
        return wavefront_scan(x, delta_top, delta_left, A_top, A_left, B_top, B_left, C, D, reverse=int(reverse))

    return {
        torch.ops.ssm_export.route_scan.default: route,
        torch.ops.ssm_export.wavefront_scan.default: wavefront,
    }


def _operator(name: str, inputs: Sequence[str]) -> values.Op:
    schema = onnx.defs.OpSchema(
        name,
        DOMAIN,
        1,
        inputs=[onnx.defs.OpSchema.FormalParameter(each, 'T') for each in inputs],
        outputs=[onnx.defs.OpSchema.FormalParameter('y', 'T')],
        type_constraints=[('T', ['tensor(float)'], 'float32')],
        attributes=[
            onnx.defs.OpSchema.Attribute('routes', onnx.defs.OpSchema.AttrType.INTS, required=False),
            *(
                onnx.defs.OpSchema.Attribute(each, onnx.defs.OpSchema.AttrType.INT, required=False)
                for each in ('per_line', 'delta_softplus', 'reverse')
            ),
        ],
    )
    return values.Op(values.Opset(DOMAIN, 1), name, schema)
