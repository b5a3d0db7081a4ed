"""Comparisons and their measurement."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from ssm_backbones.benchmark.backbones import backbone_call
from ssm_backbones.benchmark.memory import peak_bytes, peak_bytes_in_new_process
from ssm_backbones.benchmark.timing import Call, Clock, Settings, measure_interleaved, warm_up
from ssm_backbones.benchmark.unavailable import Unavailable, reason

__all__ = [
    'Comparison',
    'DetailedCall',
    'LowerBound',
    'Pair',
    'Scaling',
    'Unavailable',
    'measure_comparison',
    'measure_scaling',
    'passes',
    'ratios',
]


@dataclass(frozen=True)
class LowerBound:
    """Lower bound of the time of a job: an entry that is computed instead of measured.

    Attributes:
        seconds: The time.
        details: JSON-serialisable details of the bound, for the report.
    """

    seconds: float
    details: Mapping[str, Any]


@dataclass(frozen=True)
class DetailedCall:
    """A call to be measured, with what else is to be known of it.

    Attributes:
        call: The call.
        details: JSON-serialisable details by what they are, in a word or two, for the report and its table.
    """

    call: Call
    details: Mapping[str, Any]


Prepare = Callable[[torch.device], Call | DetailedCall | LowerBound]


@dataclass(frozen=True)
class Pair:
    """A ratio to report.

    Attributes:
        entry: Label of the entry whose time is the numerator.
        against: Label of the one whose time is the denominator.
        target: The largest ratio aimed at, if any.
        memory_target: The same for their peak memory, which is measured on GPUs.
    """

    entry: str
    against: str
    target: float | None = None
    memory_target: float | None = None


@dataclass(frozen=True)
class Comparison:
    """Entries that do the same job, measured in interleaved rounds.

    Attributes:
        name: For the table and for ``--only``.
        summary: What is done, in a few words.
        entries: By label, a function that prepares everything on a device and returns the call to be measured, which
            may have details, or a lower bound. It raises :class:`Unavailable` if something it needs is missing here.
        pairs: The ratios to report.
        devices: Types of the devices that it is meant for.
        images: How many images a call computes, where it computes images.
        during: What goes on while the rounds are measured.
    """

    name: str
    summary: str
    entries: Mapping[str, Prepare]
    pairs: tuple[Pair, ...]
    devices: tuple[str, ...] = ('cpu', 'cuda')
    images: int | None = None
    during: Callable[[], AbstractContextManager[Any]] = nullcontext


@dataclass(frozen=True)
class Scaling:
    """Forward time and peak memory of a backbone over square images of growing size."""

    name: str
    summary: str
    backbone: str
    sizes: tuple[int, ...] = (224, 384, 512, 768, 1024)
    devices: tuple[str, ...] = ('cpu', 'cuda')


def passes(train: bool) -> str:
    """Return what a call computes, for names: 'forward', or 'forward+backward' with ``train``."""
    return 'forward+backward' if train else 'forward'


def measure_comparison(comparison: Comparison, settings: Settings, clock: Clock = time.perf_counter) -> dict[str, Any]:
    """Measure a comparison.

    Args:
        comparison: What to compare.
        settings: How to measure.
        clock: Seconds since some moment.

    Returns:
        A JSON-serialisable dict: median and single seconds of each entry, its peak memory on a GPU, its details; each
        pair's ratio; under ``skipped`` the unavailable entries, and under ``failed`` those that raised an error, with
        reasons.
    """
    device = torch.device(settings.device)
    calls: dict[str, Call] = {}
    loops: dict[str, int] = {}
    details: dict[str, Mapping[str, Any]] = {}
    bounds: dict[str, LowerBound] = {}
    skipped: dict[str, str] = {}
    failed: dict[str, str] = {}
    for label, prepare in comparison.entries.items():
        try:
            prepared = prepare(device)
            if isinstance(prepared, LowerBound):
                bounds[label] = prepared
                continue
            if isinstance(prepared, DetailedCall):
                details[label] = prepared.details
                prepared = prepared.call
            loops[label] = warm_up(prepared, device, clock)
            calls[label] = prepared
        except Unavailable as error:
            skipped[label] = str(error)
        except Exception as error:
            # A failing entry must not end the measurement of the others; it is listed in the report.
            failed[label] = reason(error)
    with comparison.during():
        times = measure_interleaved(calls, settings.repeats, device, clock, loops)
    entries: dict[str, dict[str, Any]] = {}
    for label, values in times.items():
        median = statistics.median(values)
        entries[label] = {'median_s': median, 'times_s': values}
        if comparison.images:
            entries[label]['images_per_s'] = comparison.images / median
        if device.type == 'cuda':
            entries[label]['peak_bytes'] = peak_bytes(calls[label], device)
        if label in details:
            entries[label]['details'] = dict(details[label])
    for label, bound in bounds.items():
        entries[label] = {'median_s': bound.seconds, 'times_s': [bound.seconds] * settings.repeats, **bound.details}
    return {
        'name': comparison.name,
        'summary': comparison.summary,
        'pairs': [ratios(pair, entries) for pair in comparison.pairs if {pair.entry, pair.against} <= entries.keys()],
        'entries': entries,
        'skipped': skipped,
        'failed': failed,
    }


def ratios(pair: Pair, entries: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Compute a pair's ratio of times by round, and of peak memory if measured, with the targets."""
    ours, theirs = entries[pair.entry], entries[pair.against]
    ratio = statistics.median(a / b for a, b in zip(ours['times_s'], theirs['times_s'], strict=True))
    result = {
        'entry': pair.entry,
        'against': pair.against,
        'ratio': ratio,
        'target': pair.target,
        'met': None if pair.target is None else ratio <= pair.target,
    }
    if theirs.get('peak_bytes') and 'peak_bytes' in ours:
        memory = ours['peak_bytes'] / theirs['peak_bytes']
        target = pair.memory_target
        result |= {
            'memory_ratio': memory,
            'memory_target': target,
            'memory_met': None if target is None else memory <= target,
        }
    return result


def measure_scaling(scaling: Scaling, settings: Settings) -> dict[str, Any]:
    """Measure a scaling: times in interleaved rounds in this process, peak memory in a new process for each size.

    Returns:
        A JSON-serialisable dict: for each size the seconds and the peak bytes of a forward pass beyond the model's own,
        and both relative to the first size and to the number of pixels, which is 1 for linear growth.
    """
    device = torch.device(settings.device)
    calls = {str(size): backbone_call(scaling.backbone, 1, size, False, device) for size in scaling.sizes}
    times = measure_interleaved(calls, settings.repeats, device)
    peaks = [scaling_peak(scaling.backbone, size, settings.device) for size in scaling.sizes]
    first = scaling.sizes[0]
    sizes = []
    for size, peak in zip(scaling.sizes, peaks, strict=True):
        pixels = (size / first) ** 2
        ratios = [value / start / pixels for value, start in zip(times[str(size)], times[str(first)], strict=True)]
        sizes.append(
            {
                'size': size,
                'median_s': statistics.median(times[str(size)]),
                'times_s': times[str(size)],
                'time_per_pixel': statistics.median(ratios),
                'peak_bytes': peak,
                'peak_per_pixel': peak / peaks[0] / pixels,
            }
        )
    return {'name': scaling.name, 'summary': scaling.summary, 'backbone': scaling.backbone, 'sizes': sizes}


def scaling_peak(backbone: str, size: int, device: str) -> int:
    """Bytes that a forward pass of one image takes at most beyond the model and the image, in a process of its own."""
    prepare = 'ssm_backbones.benchmark.backbones:warm_backbone_call'
    return peak_bytes_in_new_process(prepare, [backbone, size], device, f'{backbone} at {size}x{size}')
