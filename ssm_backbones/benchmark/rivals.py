"""Mamba's selective scan of a sequence, and other people's implementations of it for CPUs.

Each takes u and delta (B, E, L), A (E, N), B and C (B, N, L), D and delta_bias (E), applies a softplus to the biased
delta, and returns y (B, E, L). Each is given the sequences in the layout that it is written for, and is compared with
``cuda_ops.selective_scan`` before it is measured, so that no time is that of a wrong result.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import cuda_ops
from ssm_backbones.benchmark import scans
from ssm_backbones.benchmark.comparison import Comparison, Pair, passes
from ssm_backbones.benchmark.native import native_function
from ssm_backbones.benchmark.timing import Call
from ssm_backbones.benchmark.unavailable import Unavailable

Scan = Callable[..., Tensor]
INPUTS = ('u', 'delta', 'A', 'B', 'C', 'D', 'delta_bias')
# Of the largest value of the output or a gradient.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Rival:
    """An implementation of the scan.

    Attributes:
        load: Returns it, or raises :class:`Unavailable` naming the package that is missing.
        channels_last: Whether it is written for sequences with the channels innermost in memory, not the positions.
        trains: Whether it has a backward pass.
    """

    load: Callable[[], Scan]
    channels_last: bool
    trains: bool = True


def _with_options_of_mamba(function: Callable[..., Any]) -> Scan:
    """Let a function with the interface of mamba-ssm's ``selective_scan_fn`` take the arguments alone."""

    def scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, delta_bias: Tensor) -> Tensor:
        return function(u, delta, A, B, C, D, delta_bias=delta_bias, delta_softplus=True)

    return scan


def _import(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Unavailable(f'it is of {package}, which cannot be imported: {error}') from error


def _cuda_ops() -> Scan:
    return _with_options_of_mamba(cuda_ops.selective_scan)


def _mambapy() -> Scan:
    block = _import('mambapy.mamba', 'mambapy').MambaBlock

    def scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, delta_bias: Tensor) -> Tensor:
        x, dt, B, C = (each.transpose(1, 2) for each in (u, delta, B, C))
        # The method reads nothing of its block.
        return block.selective_scan(None, x, F.softplus(dt + delta_bias), A, B, C, D).transpose(1, 2)

    return scan


def _transformers() -> Scan:
    scan = getattr(_import('transformers.models.mamba.modeling_mamba', 'transformers'), 'mamba_selective_scan', None)
    if scan is None:
        raise Unavailable('this version of transformers has no mamba_selective_scan; pip install transformers==5.24.0')
    # Unwrapped it is its code in PyTorch, where the package would otherwise look for compiled kernels.
    return _with_options_of_mamba(inspect.unwrap(scan))


def _associative_scan(compiled: bool) -> Scan:
    module = _import('torch._higher_order_ops.associative_scan', 'newer versions of torch')

    def scan(*inputs: Tensor) -> Tensor:
        return scan_by_association(*inputs, associative_scan=module.associative_scan)

    return torch.compile(scan, fullgraph=True) if compiled else scan


def scan_by_association(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    *,
    associative_scan: Callable[..., Any],
) -> Tensor:
    """Compute the scan by torch's ``associative_scan`` in its mode for any device, with the states of all positions."""
    x, dt, B, C = (each.transpose(1, 2) for each in (u, delta, B, C))
    dt = F.softplus(dt + delta_bias)
    decay, inflow = torch.exp(dt.unsqueeze(-1) * A), (dt * x).unsqueeze(-1) * B.unsqueeze(2)

    def combine(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return left[0] * right[0], right[0] * left[1] + right[1]

    _, states = associative_scan(combine, (decay, inflow), dim=1, combine_mode='generic')
    return ((states @ C.unsqueeze(-1)).squeeze(-1) + D * x).transpose(1, 2)


def _scalar() -> Scan:
    try:
        native_function('scalar_scan', 9, 4)
    except RuntimeError as error:
        raise Unavailable(str(error)) from error
    return scalar_scan


def scalar_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, delta_bias: Tensor) -> Tensor:
    """Compute the scan in the way of llama.cpp's kernel for Mamba-1: one exponential of the C library at a time.

    In float32, on all of torch's threads, each of which takes a part of the channels.

    Raises:
        RuntimeError: If the kernel cannot be compiled.
    """
    sequences = [each.transpose(1, 2).contiguous() for each in (u, delta, B, C)]
    x, dt, B, C = sequences
    batch, length, channels = x.shape
    state, y = x.new_zeros(batch, channels, A.shape[1]), torch.empty_like(x)
    arrays = (x, dt, A.contiguous(), B, C, D, delta_bias, state, y)
    sizes = (batch, length, channels, A.shape[1])
    native_function('scalar_scan', 9, 4)(*(each.data_ptr() for each in arrays), *sizes, torch.get_num_threads())
    return y.transpose(1, 2)


RIVALS = {
    'cuda_ops': Rival(_cuda_ops, channels_last=True),
    'mambapy': Rival(_mambapy, channels_last=True),
    'transformers': Rival(_transformers, channels_last=False),
    'associative_scan': Rival(partial(_associative_scan, False), channels_last=True),
    'associative_scan, compiled': Rival(partial(_associative_scan, True), channels_last=True),
    "llama.cpp's way": Rival(_scalar, channels_last=True, trains=False),
}


def sequence_scan_comparisons(states: int, shape: tuple[int, int, int] = (1, 3136, 96)) -> list[Comparison]:
    """Compare the scan of sequences (B, L, E) with :data:`RIVALS`, forward and, where they have it, backward."""
    ours, *others = RIVALS
    comparisons = []
    for train in (False, True):
        chosen = [label for label in others if RIVALS[label].trains or not train]
        comparisons.append(
            Comparison(
                f'sequence-scan/{passes(train)}/n{states}',
                f'{passes(train)} of (batch, length, channels) {shape}, N={states}',
                {label: partial(_checked_call, RIVALS[label], shape, states, train) for label in (ours, *chosen)},
                tuple(Pair(ours, label) for label in chosen),
                devices=('cpu',),
            )
        )
    return comparisons


def _checked_call(rival: Rival, shape: tuple[int, int, int], states: int, train: bool, device: torch.device) -> Call:
    """Prepare a rival's call.

    Raises:
        RuntimeError: If it does not compute what ``cuda_ops`` computes.
    """
    inputs = scans.sequence_scan_inputs(shape, states, device, channels_last=rival.channels_last)
    call, ours = (scans.scan_call(load(), inputs, train) for load in (rival.load, _cuda_ops))
    found: Any = call()
    expected: Any = ours()
    if not train:
        found, expected = [found], [expected]
    for name, value, want in zip(INPUTS, found, expected, strict=False):
        error, largest = (value - want).abs().max().item(), want.abs().max().item()
        if not error <= TOLERANCE * largest:
            what = f'gradient of {name}' if train else 'output'
            raise RuntimeError(
                f'its {what} differs from that of cuda_ops by {error:.3g}, where {largest:.3g} is largest'
            )
    return call
