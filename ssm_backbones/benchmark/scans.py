"""Inputs of the scans, the calls to measure, and their lower bounds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from ssm_backbones.benchmark.exp_rate import exp2_repeatedly
from ssm_backbones.benchmark.timing import Call
from ssm_backbones.benchmark.unavailable import Unavailable

Shape = tuple[int, int, int, int]
Inputs = tuple[Tensor, ...]


def cross_scan_inputs(shape: Shape, states: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Inputs:
    """Build x, delta, A, B, C, D, delta_bias of a cross scan of a map (B, H, W, E); parameters in float32."""
    torch.manual_seed(0)
    grid, channels = shape[:3], shape[3]
    # delta as SS2D computes it: one product for each route, so that routes are separate in memory.
    delta = torch.randn(4, *grid, channels, device=device, dtype=dtype).permute(1, 2, 3, 0, 4)
    return (
        torch.randn(shape, device=device, dtype=dtype),
        delta,
        _decay_rates(channels, states, device).expand(4, channels, states).contiguous(),
        torch.randn(*grid, 4, states, device=device, dtype=dtype),
        torch.randn(*grid, 4, states, device=device, dtype=dtype),
        torch.ones(4, channels, device=device),
        torch.full((4, channels), -4.0, device=device),
    )


def line_scan_inputs(shape: Shape, states: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Inputs:
    """Build x, delta, A, B of V2M's scan along rows, without C, of a map (B, H, W, E)."""
    torch.manual_seed(0)
    return (
        torch.randn(shape, device=device, dtype=dtype),
        torch.randn(shape, device=device, dtype=dtype) - 4,
        _decay_rates(shape[3], states, device),
        torch.randn(*shape[:3], states, device=device, dtype=dtype),
    )


def sequence_scan_inputs(
    shape: tuple[int, int, int], states: int, device: torch.device, *, channels_last: bool
) -> Inputs:
    """Build u, delta, A, B, C, D, delta_bias of Mamba's scan of a sequence, as ``cuda_ops.selective_scan`` takes them.

    Args:
        shape: Batch, length and channels.
        states: State size N.
        device: Where to put them.
        channels_last: Whether channels and states are innermost in memory, not the positions. The values are the same.
    """
    torch.manual_seed(0)
    batch, length, channels = shape

    def sequence(count: int) -> Tensor:
        value = torch.randn(batch, length, count, device=device).transpose(1, 2)
        return value if channels_last else value.contiguous()

    return (
        sequence(channels),
        sequence(channels),
        _decay_rates(channels, states, device),
        sequence(states),
        sequence(states),
        torch.ones(channels, device=device),
        torch.full((channels,), -4.0, device=device),
    )


def wavefront_inputs(shape: Shape, states: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Inputs:
    """Build x, delta_top, delta_left, A_top, A_left, B_top, B_left, C, D of a wavefront scan of (B, H, W, E)."""
    torch.manual_seed(0)

    def steps() -> Tensor:
        return nn.functional.softplus(torch.randn(shape, device=device) - 4).to(dtype)

    def projection() -> Tensor:
        return torch.randn(*shape[:3], states, device=device, dtype=dtype)

    rates = _decay_rates(shape[3], states, device)
    return (
        torch.randn(shape, device=device, dtype=dtype),
        steps(),
        steps(),
        rates,
        rates.clone(),
        projection(),
        projection(),
        projection(),
        torch.ones(shape[3], device=device),
    )


def _decay_rates(channels: int, states: int, device: torch.device) -> Tensor:
    return -torch.arange(1.0, states + 1, device=device).expand(channels, states).contiguous()


def scan_call(scan: Callable[..., Tensor], inputs: Sequence[Tensor], train: bool) -> Call:
    """Prepare a scan of these inputs, or its forward and backward pass with ``train``."""
    if not train:

        def forward() -> Tensor:
            with torch.no_grad():
                return scan(*inputs)

        return forward
    leaves = [value.detach().requires_grad_() for value in inputs]
    weight = torch.ones_like(scan(*leaves))
    return lambda: torch.autograd.grad(scan(*leaves), leaves, weight)


def copy_call(inputs: Sequence[Tensor], train: bool) -> Call:
    """Copy what a scan of these inputs reads and writes, and with ``train`` the gradients of all of it.

    The output is like the first input.
    """
    tensors = [*inputs, torch.ones_like(inputs[0], memory_format=torch.contiguous_format)]
    pairs = [(value, torch.empty_like(value)) for value in tensors * (2 if train else 1)]

    def copy() -> None:
        for source, target in pairs:
            target.copy_(source)

    return copy


def exponentials_call(count: int, device: torch.device) -> Call:
    """So many exponentials, by the CPU kernels' own vectorised function, on all threads, in the L1 cache.

    No scan that computes them can take less time, as :func:`ssm_backbones.benchmark.exp_rate.measure_exp_rate` has it.

    Raises:
        Unavailable: If the function cannot be compiled, or on another device.
    """
    if device.type != 'cpu':
        raise Unavailable("the function whose speed is measured is the CPU kernels'")
    x = torch.linspace(-20, 0, 1024 * torch.get_num_threads())
    try:
        exp2_repeatedly(x, 1)
    except RuntimeError as error:
        raise Unavailable(str(error)) from error
    return partial(exp2_repeatedly, x, max(1, round(count / x.numel())))
