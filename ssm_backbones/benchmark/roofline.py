"""Lower bounds of the scans' times (roofline): bytes moved and exponentials computed, at the device's peak rates.

Counted are each input read once and each output written once (maps alone: parameters are small), and exponentials: one
for each route, pixel, channel and state, two for a softplus; for each of a wavefront scan's two neighbours. The
backward pass reads the inputs and the output's gradient, writes the inputs' gradients, and computes the exponentials
once more. The lower bound of a pass is the longer of the two times; forward and backward pass are added.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ssm_backbones.benchmark.comparison import LowerBound
from ssm_backbones.benchmark.exp_rate import measure_exp_rate
from ssm_backbones.benchmark.timing import seconds
from ssm_backbones.benchmark.unavailable import Unavailable


@dataclass(frozen=True)
class Work:
    """Minimal work of one pass of a scan: bytes moved and exponentials computed."""

    bytes: int
    exponentials: int


@dataclass(frozen=True)
class Rates:
    """Peak rates of a device per second: bytes read and written by a copy, and exponentials."""

    bytes: float
    exponentials: float


def route_scan_work(
    shape: Sequence[int], routes: int, states: int, itemsize: int, *, projections: int = 2, softplus: bool = True
) -> tuple[Work, Work]:
    """Return the work of the forward and the backward pass of a route scan of a map (B, H, W, E).

    Args:
        shape: Shape of the map.
        routes: Number of routes; each has delta (E) and projections (N) for each pixel.
        states: State size N.
        itemsize: Bytes per element.
        projections: 2 for B and C, 1 if one of them is None.
        softplus: Whether softplus is applied to delta.
    """
    pixels, channels = math.prod(shape[:3]), shape[3]
    inputs = channels + routes * (channels + projections * states)
    exponentials = pixels * routes * channels * (states + (2 if softplus else 0))
    return _passes(pixels * itemsize, inputs, channels, exponentials)


def wavefront_scan_work(shape: Sequence[int], states: int, itemsize: int) -> tuple[Work, Work]:
    """Return the work of the forward and the backward pass of a wavefront scan, with delta after softplus."""
    pixels, channels = math.prod(shape[:3]), shape[3]
    return _passes(pixels * itemsize, 3 * channels + 3 * states, channels, 2 * pixels * channels * states)


def _passes(scale: int, inputs: int, outputs: int, exponentials: int) -> tuple[Work, Work]:
    # Backward: inputs, the gradient of the output, and the gradients of the inputs.
    return Work(scale * (inputs + outputs), exponentials), Work(scale * (2 * inputs + outputs), exponentials)


def lower_bound(passes: Sequence[Work], rates: Rates) -> LowerBound:
    """Return the lower bound of the time of successive passes, with its details."""
    times = [(each.bytes / rates.bytes, each.exponentials / rates.exponentials) for each in passes]
    return LowerBound(
        sum(max(pair) for pair in times),
        {
            'lower bound': {
                'bytes': [each.bytes for each in passes],
                'exponentials': [each.exponentials for each in passes],
                'bytes_per_s': rates.bytes,
                'exponentials_per_s': rates.exponentials,
            }
        },
    )


@functools.cache
def measure_rates(device: torch.device) -> Rates:
    """Measure a device's copy bandwidth and its rate of exponentials, once in a process.

    Raises:
        Unavailable: If its exponentials cannot be measured.
    """
    try:
        exponentials = measure_exp_rate(device=device.type if device.index is None else str(device))
    except RuntimeError as error:
        raise Unavailable(f'the rate of exponentials of {device} cannot be measured: {error}') from error
    return Rates(measure_copy_rate(device), exponentials)


def measure_copy_rate(device: torch.device, size: int | None = None, duration: float = 0.3) -> float:
    """Bytes a second, read and written, of a copy that no cache holds.

    Args:
        device: Where.
        size: Bytes to copy; a GiB on a GPU, 256 MiB on a CPU.
        duration: Seconds to measure for; the fastest run counts, because other programs may run.
    """
    if size is None:
        size = 2**30 if device.type == 'cuda' else 2**28
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    loops = 8 if device.type == 'cuda' else 1
    seconds(lambda: target.copy_(source), 1, device)
    fastest, end = math.inf, time.perf_counter() + duration
    while math.isinf(fastest) or time.perf_counter() < end:
        fastest = min(fastest, seconds(lambda: target.copy_(source), loops, device))
    return 2 * size / fastest
