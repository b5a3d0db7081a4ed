"""Time calls in interleaved rounds on a device."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

# A round repeats a short call until it takes this long, so that the clock and the first cache misses do not count.
ROUND_SECONDS = 0.05

Call = Callable[[], object]
Clock = Callable[[], float]


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        device: Where, as torch names devices.
        repeats: Rounds of each comparison.
        threads: Threads of the CPU, None for torch's choice.
    """

    device: str = 'cpu'
    repeats: int = 10
    threads: int | None = None

    def __post_init__(self) -> None:
        for name in ('repeats', 'threads'):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f'{name} must be at least 1, got {value}')
        try:
            if torch.device(self.device).type not in ('cpu', 'cuda'):
                raise ValueError(f'the device is cpu, cuda or cuda:1, got {self.device!r}')
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f'the device {self.device!r} cannot be used: {str(error).splitlines()[0]}') from error


def warm_up(call: Call, device: torch.device, clock: Clock = time.perf_counter) -> int:
    """Run a call twice, and return how often a round has to repeat it to last :data:`ROUND_SECONDS`."""
    seconds(call, 1, device, clock)
    return max(1, math.ceil(ROUND_SECONDS / max(seconds(call, 1, device, clock), 1e-9)))


def measure_interleaved(
    calls: Mapping[str, Call],
    repeats: int,
    device: torch.device,
    clock: Clock = time.perf_counter,
    loops: Mapping[str, int] | None = None,
) -> dict[str, list[float]]:
    """Measure seconds of each call in interleaved rounds; every second round in the opposite order.

    Args:
        calls: By label.
        repeats: Number of rounds.
        device: Where the calls compute.
        clock: Seconds since some moment.
        loops: Calls per round of each call, which has been warmed up; by default from :func:`warm_up`.
    """
    if loops is None:
        loops = {label: warm_up(call, device, clock) for label, call in calls.items()}
    times: dict[str, list[float]] = {label: [] for label in calls}
    order = list(calls)
    for _ in range(repeats):
        for label in order:
            times[label].append(seconds(calls[label], loops[label], device, clock))
        order.reverse()
    return times


def seconds(call: Call, loops: int, device: torch.device, clock: Clock = time.perf_counter) -> float:
    """Seconds that one of ``loops`` runs of a call takes, until the device has computed them."""
    _wait(device)
    start = clock()
    for _ in range(loops):
        call()
    _wait(device)
    return (clock() - start) / loops


def _wait(device: torch.device) -> None:
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
