"""The functions of ``mamba_ssm.ops.selective_scan_interface``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cuda_ops import _checks
from cuda_ops._reference_mode import use_reference
from cuda_ops.mamba_ssm._convolution import causal_conv1d_fn
from cuda_ops.route_reference import state_dtype
from cuda_ops.sequence_scan import selective_scan


def refuse_complex(**tensors: Tensor) -> None:
    """Raise NotImplementedError for complex tensors."""
    for name, value in tensors.items():
        if value.is_complex():
            raise NotImplementedError(
                f'{name} is {value.dtype}; cuda_ops.mamba_ssm serves real states only. mamba_ssm and its compiled '
                'selective_scan_cuda serve complex ones, without cuda_ops.mamba_ssm'
            )


def check_maps(u: Tensor, delta: Tensor, B: Tensor, C: Tensor, z: Tensor | None = None) -> None:
    """Raise unless what varies along the sequence has one dtype, as mamba-ssm's own kernel does."""
    refuse_complex(B=B, C=C)
    variable = {name: value for name, value in (('B', B), ('C', C)) if value.dim() > 2}
    _checks.same_dtype_and_device(u=u, delta=delta, z=z, **variable)


def scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    *,
    delta_softplus: bool,
    wide: bool,
) -> tuple[Tensor, Tensor]:
    """Scan in the dtype of u, whatever autocast would take; with ``wide`` half precision is made float32 before.

    Returns:
        (B, E, L), contiguous as mamba-ssm's is, and the last state.
    """
    refuse_complex(A=A, B=B, C=C)
    if wide:
        dtype = state_dtype(u.dtype)
        u, delta, B, C = (value.to(dtype) for value in (u, delta, B, C))
    with torch.autocast(u.device.type, enabled=False):
        y, last = selective_scan(
            u, delta, A, B, C, D, delta_bias=delta_bias, delta_softplus=delta_softplus, return_last_state=True
        )
    return y.contiguous(), last


def gate(y: Tensor, z: Tensor, dtype: torch.dtype) -> Tensor:
    """``y * silu(z)``, rounded once."""
    return (y * F.silu(z.to(y.dtype))).to(dtype)


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute :func:`cuda_ops.selective_scan`, with the gate applied before the output is rounded to u's dtype.

    Inputs and outputs are those of :func:`cuda_ops.selective_scan`. Autocast does not change the dtype, as it does not
    in mamba-ssm; the last state has a gradient, which it has not there.

    Raises:
        NotImplementedError: If A, B or C is complex.
    """
    check_maps(u, delta, B, C, z)
    y, last = scan(u, delta, A, B, C, D, delta_bias, delta_softplus=delta_softplus, wide=z is not None)
    if z is not None:
        y = gate(y, z, u.dtype)
    return (y, last) if return_last_state else y


def selective_scan_ref(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute :func:`selective_scan_fn` by plain PyTorch operations, in float32, from any mixture of dtypes."""
    with use_reference():
        y, last = scan(u, delta, A, B, C, D, delta_bias, delta_softplus=delta_softplus, wide=True)
    y = y.to(u.dtype) if z is None else gate(y, z, u.dtype)
    return (y, last) if return_last_state else y


def mamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
) -> Tensor:
    """Compute Mamba's mixer between its input projection and its output: convolution, scan, gate and projection.

    Args:
        xz: (B, 2E, L), the input and the gate.
        conv1d_weight: (E, 1, W) of the causal depthwise convolution; conv1d_bias: (E) or None.
        x_proj_weight: (R + N for each of B and C that is None, E), with dt_rank R.
        delta_proj_weight: (E, R).
        out_proj_weight: (F, E); out_proj_bias: (F) or None.
        A: (E, N); B, C: constant (E, N), or None for those of ``x_proj_weight``; D, delta_bias: (E) or None.
        B_proj_bias, C_proj_bias: (N), added to the projected B and C, or None.
        delta_softplus: Whether delta + delta_bias passes a softplus.
        checkpoint_lvl: 0 or 1; accepted, and nothing is recomputed in the backward pass.
        b_rms_weight, c_rms_weight, dt_rms_weight: Weights of RMS norms of B (N), C (N) and delta (E), or None. They
            have gradients, which they have not in mamba-ssm.
        b_c_dt_rms_eps: Those norms' epsilon.

    Returns:
        (B, L, F). Under autocast, xz is cast to its dtype as in a matrix product.

    Raises:
        NotImplementedError: If A, B or C is complex.
        ValueError: If checkpoint_lvl is neither 0 nor 1.
    """
    if checkpoint_lvl not in (0, 1):
        raise ValueError(f'checkpoint_lvl must be 0 or 1, got {checkpoint_lvl!r}')
    (xz,) = _checks.autocast(xz)
    norms = (b_rms_weight, c_rms_weight, dt_rms_weight, b_c_dt_rms_eps)
    return _inner(
        selective_scan_fn,
        (xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias),
        (A, B, C, D, delta_bias, B_proj_bias, C_proj_bias, delta_softplus),
        norms,
    )


def mamba_inner_ref(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
) -> Tensor:
    """Compute :func:`mamba_inner_fn` with :func:`selective_scan_ref`; ``delta_softplus`` counts, unlike there."""
    return _inner(
        selective_scan_ref,
        (xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias),
        (A, B, C, D, delta_bias, B_proj_bias, C_proj_bias, delta_softplus),
        (None, None, None, 0.0),
    )


def _inner(scan_function: Callable[..., Any], layers: Any, parameters: Any, norms: Any) -> Tensor:
    xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias = layers
    A, B, C, D, delta_bias, B_proj_bias, C_proj_bias, delta_softplus = parameters
    b_rms_weight, c_rms_weight, dt_rms_weight, eps = norms
    refuse_complex(A=A)
    rank, states = delta_proj_weight.shape[1], A.shape[1]
    x, z = xz.chunk(2, dim=1)
    convolved: Any = causal_conv1d_fn(x, conv1d_weight.squeeze(1), conv1d_bias, activation='silu')
    projected = F.linear(convolved.mT, x_proj_weight)
    delta = _rms_norm(F.linear(projected[..., :rank], delta_proj_weight), dt_rms_weight, eps).mT
    if B is None:
        B = _projection(projected[..., rank : rank + states], B_proj_bias, b_rms_weight, eps)
    if C is None:
        C = _projection(projected[..., -states:], C_proj_bias, c_rms_weight, eps)
    y = scan_function(convolved, delta, A, B, C, D, z, delta_bias, delta_softplus)
    return F.linear(y.mT, out_proj_weight, out_proj_bias)


def _projection(value: Tensor, bias: Tensor | None, weight: Tensor | None, eps: float) -> Tensor:
    """B or C of the positions (B, L, N), as (B, N, L)."""
    if bias is not None:
        value = value + bias.to(value.dtype)
    return _rms_norm(value, weight, eps).mT


def _rms_norm(value: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Normalise the last dimension in float32, and return it in its dtype; None leaves it as it is."""
    if weight is None:
        return value
    wide = value.to(state_dtype(value.dtype))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight).to(value.dtype)
