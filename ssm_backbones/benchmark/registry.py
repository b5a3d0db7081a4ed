"""Registry of what ``tools/benchmark.py`` measures by name."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatch

import torch

from ssm_backbones.benchmark import gpu
from ssm_backbones.benchmark.comparison import Comparison, Scaling, measure_comparison, measure_scaling
from ssm_backbones.benchmark.compiled import compiled_comparisons
from ssm_backbones.benchmark.cpu import (
    backbone_comparisons,
    bfloat16_comparison,
    cross_scan_comparisons,
    wavefront_comparisons,
)
from ssm_backbones.benchmark.export import EXPORTS, ExportComparison, measure_export
from ssm_backbones.benchmark.exported import STANDARD, exported_comparisons
from ssm_backbones.benchmark.loaded import loaded_comparison
from ssm_backbones.benchmark.machine import describe_machine
from ssm_backbones.benchmark.report import Report
from ssm_backbones.benchmark.rivals import sequence_scan_comparisons
from ssm_backbones.benchmark.timing import Settings
from ssm_backbones.benchmark.unavailable import reason

COMPARISONS: list[Comparison] = [
    *backbone_comparisons('vmamba-tiny', forward=1.1, training=1.25),
    *backbone_comparisons('vmamba-tiny-s2l5'),
    *backbone_comparisons('vmamba-tiny-v0'),
    *backbone_comparisons('mamba2d-tiny', forward=1.3, training=1.5),
    *backbone_comparisons('v2m-hier-small', forward=1.3, training=1.5),
    *backbone_comparisons('v2m-tiny', against=('deit-tiny',)),
    *cross_scan_comparisons(states=1),
    *cross_scan_comparisons(states=16),
    *wavefront_comparisons(states=16, target=2.0),
    *sequence_scan_comparisons(states=1),
    *sequence_scan_comparisons(states=16),
    *(bfloat16_comparison(name) for name in ('vmamba-tiny', 'mamba2d-tiny', 'v2m-hier-small', 'v2m-tiny')),
    *(loaded_comparison(name) for name in ('vmamba-tiny', 'mamba2d-tiny', 'v2m-hier-small')),
    *compiled_comparisons(),
    *gpu.COMPARISONS,
    *(comparison for name in STANDARD for comparison in exported_comparisons(name)),
]
SCALINGS: list[Scaling] = [
    Scaling(f'{name}/sizes', 'forward pass of one image from 224x224 to 1024x1024', name)
    for name in ('vmamba-tiny', 'mamba2d-tiny', 'v2m-hier-small')
]

Entry = Comparison | Scaling | ExportComparison


def select(patterns: Sequence[str] = (), device: str | None = None) -> list[Entry]:
    """Return the comparisons and scalings whose names match one of the shell-style patterns, or all.

    Args:
        patterns: Names or patterns; without any, everything.
        device: Where it will be measured: without patterns, only what is meant for devices of its type.

    Raises:
        ValueError: If a pattern matches nothing.
    """
    everything: list[Entry] = [*COMPARISONS, *SCALINGS, *EXPORTS]
    for pattern in patterns:
        if not any(fnmatch(each.name, pattern) for each in everything):
            names = ', '.join(each.name for each in everything)
            raise ValueError(f'no comparison is called {pattern!r}; there are {names}')
    if patterns:
        return [each for each in everything if any(fnmatch(each.name, pattern) for pattern in patterns)]
    return [each for each in everything if device is None or torch.device(device).type in each.devices]


def run(
    selected: Iterable[Entry],
    settings: Settings,
    progress: Callable[[str], None] = lambda line: None,
    seconds: float | None = None,
    save: Callable[[Report], None] = lambda report: None,
) -> Report:
    """Measure everything selected.

    Args:
        selected: From :func:`select`.
        settings: How to measure.
        progress: Called with the name of the next measurement.
        seconds: Time limit after which no measurement is started; the report names the remaining ones.
        save: Called with the report after each comparison and scaling.
    """
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    start = time.monotonic()
    report = Report(describe_machine(settings.device), {'repeats': settings.repeats, 'device': settings.device})
    kind = torch.device(settings.device).type
    for each in selected:
        if kind not in each.devices:
            report.skipped.append(dict(name=each.name, reason=f'it is for --device {" or ".join(each.devices)}'))
        elif seconds is not None and time.monotonic() - start > seconds:
            report.skipped.append(dict(name=each.name, reason=f'{seconds:g} seconds were over'))
        else:
            progress(each.name)
            _measure(each, settings, report)
        save(report)
    return report


def _measure(each: Entry, settings: Settings, report: Report) -> None:
    if isinstance(each, Scaling):
        try:
            report.scalings.append(measure_scaling(each, settings))
        except RuntimeError as error:
            report.failed.append(dict(name=each.name, reason=reason(error)))
        return
    if isinstance(each, ExportComparison):
        result = measure_export(each, settings)
    else:
        result = measure_comparison(each, settings)
    report.comparisons.append(result)
    for outcome, entries in (('skipped', report.skipped), ('failed', report.failed)):
        entries += [dict(name=f'{each.name}: {label}', reason=reason) for label, reason in result[outcome].items()]
    if torch.device(settings.device).type == 'cuda':
        gc.collect()
        torch.cuda.empty_cache()
