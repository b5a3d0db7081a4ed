"""The functions of the compiled modules that mamba-ssm and VMamba call within autograd functions of their own.

A backward pass gets the forward's inputs again, and the state after each of the kernel's chunks. Here the sequence is
one chunk, and the backward pass computes the scan once more.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cuda_ops.mamba_ssm._interface import check_maps, gate, scan


def mamba_forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> list[Tensor]:
    """``selective_scan_cuda.fwd``: the output before its gate, the states, and with z the gated output.

    Args:
        u, delta, z: (B, E, L).
        A: (E, N); B, C: (B, G, N, L), or constant (E, N); D, delta_bias: (E) or None.
        delta_softplus: Whether delta + delta_bias passes a softplus.

    Returns:
        (B, E, L), (B, E, 1, 2N), and (B, E, L) if z is given. Of the states, ``[..., 1::2]`` holds the last one; the
        others, where mamba-ssm keeps products of decays for its own backward pass, are NaN.
    """
    check_maps(u, delta, B, C, z)
    y, last = scan(u, delta, A, B, C, D, delta_bias, delta_softplus=delta_softplus, wide=z is not None)
    gated = [] if z is None else [gate(y, z, u.dtype)]
    return [y.to(u.dtype), _states(last), *gated]


def mamba_backward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    dout: Tensor,
    x: Tensor | None,
    out: Tensor | None,
    dz: Tensor | None,
    delta_softplus: bool,
    recompute_out_z: bool,
) -> list[Tensor | None]:
    """``selective_scan_cuda.bwd``: gradients of u, delta, A, B, C, D, delta_bias, then of z, then the gated output.

    Args:
        u, delta, A, B, C, D, z, delta_bias, delta_softplus: As for the forward pass.
        dout: (B, E, L), the gradient of the output, the gated one where z is given.
        x, out: Results of the forward pass, which are not needed here.
        dz: Where to write z's gradient, or None.
        recompute_out_z: Whether to return the gated output, too.
    """
    check_maps(u, delta, B, C, z)
    leaves = _leaves(u, delta, A, B, C, D, delta_bias, z)
    with torch.enable_grad():
        *scanned, gate_values = leaves
        y, _ = scan(*scanned, delta_softplus=delta_softplus, wide=z is not None)
        if gate_values is not None:
            y = gate(y, gate_values, u.dtype)
    grads = _gradients(y, dout, leaves)
    grad_z = grads.pop()
    if grad_z is not None:
        grads.append(grad_z if dz is None else dz.copy_(grad_z))
        if recompute_out_z:
            grads.append(y.detach())
    return grads


def core_forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    nrows: int,
) -> list[Tensor]:
    """``selective_scan_cuda_core.fwd``: :func:`oflex_forward` with the output in u's dtype."""
    return oflex_forward(u, delta, A, B, C, D, delta_bias, delta_softplus, nrows, False)


def oflex_forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    nrows: int,
    out_float: bool,
) -> list[Tensor]:
    """``selective_scan_cuda_oflex.fwd``: the output and the states.

    Args:
        u: (B, E, L); delta: the same, or (B, E / K, L) for K successive channels each.
        A: (E, N); B, C: (B, G, N, L); D: (E) or None; delta_bias: (E) or (E / K) like delta, or None.
        delta_softplus: Whether delta + delta_bias passes a softplus.
        nrows: A property of VMamba's kernel, without effect here.
        out_float: Whether the output is float32 instead of u's dtype.

    Returns:
        (B, E, L), and (B, E, 1, 2N) as by :func:`mamba_forward`.
    """
    check_maps(u, delta, B, C)
    y, last = scan(u, *_repeated(u, delta, A, B, C, D, delta_bias), delta_softplus=delta_softplus, wide=out_float)
    return [y, _states(last)]


def core_backward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    dout: Tensor,
    x: Tensor | None,
    delta_softplus: bool,
    nrows: int,
) -> list[Tensor | None]:
    """``bwd`` of ``selective_scan_cuda_core`` and ``_oflex``: gradients of u, delta, A, B, C, D and delta_bias.

    Arguments are the forward pass's; ``dout`` (B, E, L) is in u's dtype or float32, and x is not needed.
    """
    check_maps(u, delta, B, C)
    leaves = _leaves(u, delta, A, B, C, D, delta_bias)
    with torch.enable_grad():
        y, _ = scan(leaves[0], *_repeated(*leaves), delta_softplus=delta_softplus, wide=dout.dtype != u.dtype)
    return _gradients(y, dout, leaves)


def _repeated(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, delta_bias: Tensor | None
) -> Any:
    """Give every channel its delta, and return all but u."""
    channels, deltas = u.shape[1], delta.shape[1]
    if channels != deltas:
        if not deltas or channels % deltas:
            raise ValueError(f'delta has {deltas} channels, which do not divide the {channels} of u')
        delta = delta.repeat_interleave(channels // deltas, dim=1)
        delta_bias = None if delta_bias is None else delta_bias.repeat_interleave(channels // deltas)
    return delta, A, B, C, D, delta_bias


def _states(last: Tensor) -> Tensor:
    """The last state (B, E, N) where the kernels' callers look for it: (B, E, 1, 2N)."""
    return torch.stack([torch.full_like(last, float('nan')), last], dim=-1).flatten(2).unsqueeze(2)


def _leaves(*tensors: Tensor | None) -> list[Any]:
    """Copies of the inputs to differentiate in, None for those that are None."""
    return [None if value is None else value.detach().requires_grad_() for value in tensors]


def _gradients(y: Tensor, dout: Tensor, leaves: list[Any]) -> list[Tensor | None]:
    """Gradients of the leaves, contiguous as the kernels' are; None for those that are None."""
    grads = iter(torch.autograd.grad(y, [leaf for leaf in leaves if leaf is not None], dout.to(y.dtype)))
    return [None if leaf is None else next(grads).contiguous() for leaf in leaves]
