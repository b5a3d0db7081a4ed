"""Compare the speed and memory of the backbones and scans with what they compete against.

What is compared is data: :data:`COMPARISONS` and :data:`SCALINGS`. To add a family, name its models in
:data:`BACKBONES` and append :func:`backbone_comparisons` and a :class:`Scaling`. Everything of one comparison is
measured in one run, in turns, so that a disturbance of the machine hits all alike; a ratio is the median of the ratios
of the single turns.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn

import cuda_ops

# A turn repeats a short call until it takes this long, so that the clock and the first cache misses do not count.
TURN_SECONDS = 0.05

Call = Callable[[], object]


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        device: where, as torch names devices.
        repeats: turns of each entry of a comparison.
        threads: threads of the CPU, None for torch's choice.
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
            available = torch.device(self.device).type == 'cpu' or torch.empty(0, device=self.device).numel() == 0
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise ValueError(f'the device {self.device!r} cannot be used: {str(error).splitlines()[0]}') from error
        if not available:
            raise ValueError(f'the device {self.device!r} cannot be used')


@dataclass(frozen=True)
class Pair:
    """A ratio to report: the time of ``entry`` over that of ``against``, with the largest ratio aimed at, if any."""

    entry: str
    against: str
    target: float | None = None


@dataclass(frozen=True)
class Comparison:
    """Entries that do the same job, measured in turns.

    Attributes:
        name: for the table and for ``--only``.
        summary: what is done, in a few words.
        entries: by label, a function that prepares everything on a device and returns the call to be measured.
        pairs: the ratios to report.
    """

    name: str
    summary: str
    entries: Mapping[str, Callable[[torch.device], Call]]
    pairs: tuple[Pair, ...]


@dataclass(frozen=True)
class Scaling:
    """Forward time and peak memory of a backbone over square images of growing size."""

    name: str
    summary: str
    backbone: str
    sizes: tuple[int, ...] = (224, 384, 512, 768, 1024)


@dataclass
class Report:
    """What was measured: ready for JSON, and as a table."""

    machine: dict[str, Any]
    settings: dict[str, Any]
    comparisons: list[dict[str, Any]] = field(default_factory=list)
    scalings: list[dict[str, Any]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """All of it, of JSON's types."""
        return {
            'machine': self.machine,
            'settings': self.settings,
            'comparisons': self.comparisons,
            'scalings': self.scalings,
        }

    def as_table(self) -> str:
        """Markdown: the machine in a line, then the comparisons, then the scalings."""
        parts = [', '.join(f'{key} {value}' for key, value in self.machine.items())]
        if self.comparisons:
            rows = [_pair_row(comparison, pair) for comparison in self.comparisons for pair in comparison['pairs']]
            header = ('comparison', 'entry', 'ms', 'against', 'ms', 'ratio', 'target')
            parts.append(_markdown(header, rows, text=(0, 1, 3)))
        if self.scalings:
            rows = [_size_row(scaling, size) for scaling in self.scalings for size in scaling['sizes']]
            parts.append(_markdown(('scaling', 'image', 'ms', 'per pixel', 'peak MiB', 'per pixel'), rows, text=(0, 1)))
        return '\n\n'.join(parts)


# --- what is compared ---

BACKBONES: dict[str, dict[str, Any]] = {
    'vmamba-tiny': dict(type='VMamba', arch='tiny', out_indices=(3,)),
    'vmamba-tiny-s2l5': dict(type='VMamba', arch='tiny-s2l5', out_indices=(3,)),
    'vmamba-tiny-v0': dict(type='VMamba', arch='tiny-v0', out_indices=(3,)),
    'swin-tiny': dict(type='mmpretrain.SwinTransformer', arch='tiny', img_size=224, drop_path_rate=0.0),
    'convnext-tiny': dict(type='mmpretrain.ConvNeXt', arch='tiny', drop_path_rate=0.0),
}


def build_backbone(name: str, device: torch.device) -> nn.Module:
    """Build an entry of :data:`BACKBONES`; one of a host library makes that library register its models first."""
    config = BACKBONES[name]
    library, _, _ = config['type'].rpartition('.')
    importlib.import_module(f'{library}.models' if library else 'ssm_backbones')
    return MODELS.build(dict(config)).to(device)


def backbone_call(name: str, batch: int, size: int, train: bool, device: torch.device) -> Call:
    """The forward pass of a backbone on random square images, or forward and backward with ``train``."""
    torch.manual_seed(0)
    model = build_backbone(name, device)
    model.train(train)
    images = torch.randn(batch, 3, size, size, device=device)

    def forward() -> None:
        with torch.inference_mode():
            model(images)

    def forward_and_backward() -> None:
        model.zero_grad(set_to_none=True)
        model(images)[-1].sum().backward()

    return forward_and_backward if train else forward


def backbone_comparisons(name: str, forward: float | None = None, training: float | None = None) -> list[Comparison]:
    """A backbone against Swin-T and ConvNeXt-T at 224x224, with the ratios to Swin-T that are aimed at.

    Args:
        name: key of :data:`BACKBONES`.
        forward: target of the forward pass, at batch 1 and 4.
        training: target of forward and backward pass together, at batch 4.
    """
    comparisons = []
    for batch, train in ((1, False), (4, False), (4, True)):
        passes = 'forward+backward' if train else 'forward'
        entries = {
            entry: partial(backbone_call, entry, batch, 224, train) for entry in (name, 'swin-tiny', 'convnext-tiny')
        }
        pairs = (Pair(name, 'swin-tiny', training if train else forward), Pair(name, 'convnext-tiny'))
        comparisons.append(
            Comparison(f'{name}/{passes}/batch-{batch}', f'{passes} at 224x224, batch {batch}', entries, pairs)
        )
    return comparisons


ScanInputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def scan_inputs(shape: tuple[int, int, int, int], states: int, device: torch.device) -> ScanInputs:
    """Arguments x, delta, A, B, C, D, delta_bias of a cross scan of a map (B, H, W, E), in float32."""
    torch.manual_seed(0)
    grid, channels = shape[:3], shape[3]
    # The step sizes as SS2D computes them: one product for each route, so that routes lie apart in memory.
    delta = torch.randn(4, *grid, channels, device=device).permute(1, 2, 3, 0, 4)
    A = -torch.arange(1.0, states + 1, device=device).expand(4, channels, states).contiguous()
    return (
        torch.randn(shape, device=device),
        delta,
        A,
        torch.randn(*grid, 4, states, device=device),
        torch.randn(*grid, 4, states, device=device),
        torch.ones(4, channels, device=device),
        torch.full((4, channels), -4.0, device=device),
    )


def cross_scan_by_loop(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, delta_bias: Tensor
) -> Tensor:
    """``cuda_ops.cross_selective_scan`` in plain PyTorch: the routes side by side, one position after the other."""
    batch, height, width, channels = x.shape

    def routes(grid: Tensor) -> Tensor:
        """(B, H, W, 4, ...) in the routes' orders, (B, H*W, 4, ...)."""
        rows, columns = grid.flatten(1, 2), grid.transpose(1, 2).flatten(1, 2)
        return torch.stack([rows[:, :, 0], columns[:, :, 1], rows[:, :, 2].flip(1), columns[:, :, 3].flip(1)], dim=2)

    u = routes(x.unsqueeze(3).expand(-1, -1, -1, 4, -1))
    d = nn.functional.softplus(routes(delta) + delta_bias)
    h = x.new_zeros(batch, 4, channels, A.shape[2])
    outputs = []
    along = (d.unsqueeze(-1), u.unsqueeze(-1), routes(B).unsqueeze(3), routes(C).unsqueeze(3))
    for step, value, b, c in zip(*(each.unbind(1) for each in along), strict=True):
        h = torch.exp(step * A) * h + step * b * value
        outputs.append((h * c).sum(-1))
    y = torch.stack(outputs, dim=1) + D * u
    rows = (y[:, :, 0] + y[:, :, 2].flip(1)).view(x.shape)
    columns = (y[:, :, 1] + y[:, :, 3].flip(1)).view(batch, width, height, channels)
    return rows + columns.transpose(1, 2)


def scan_call(
    scan: Callable[..., Tensor], shape: tuple[int, int, int, int], states: int, train: bool, device: torch.device
) -> Call:
    """A cross scan, or its forward and backward pass with ``train``."""
    inputs = scan_inputs(shape, states, device)
    if not train:
        return partial(scan, *inputs)
    leaves = [value.detach().requires_grad_() for value in inputs]
    weight = torch.ones(shape, device=device)
    return lambda: torch.autograd.grad(scan(*leaves), leaves, weight)


def copy_call(shape: tuple[int, int, int, int], states: int, train: bool, device: torch.device) -> Call:
    """Copy what a scan has to read and write: inputs and output, and with ``train`` the gradients of all of them."""
    tensors = [*scan_inputs(shape, states, device), torch.ones(shape, device=device)]
    pairs = [(value, torch.empty_like(value)) for value in tensors * (2 if train else 1)]

    def copy() -> None:
        for source, target in pairs:
            target.copy_(source)

    return copy


def scan_comparisons(states: int, shape: tuple[int, int, int, int] = (1, 56, 56, 96)) -> list[Comparison]:
    """The cross scan against the loop and against a copy of its inputs and outputs, whose time nothing can beat."""
    comparisons = []
    for train in (False, True):
        passes = 'forward+backward' if train else 'forward'
        entries = {
            'cuda_ops': partial(scan_call, cuda_ops.cross_selective_scan, shape, states, train),
            'loop': partial(scan_call, cross_scan_by_loop, shape, states, train),
            'copy': partial(copy_call, shape, states, train),
        }
        comparisons.append(
            Comparison(
                f'cross-scan/{passes}/n{states}',
                f'{passes} at {shape}, N={states}',
                entries,
                (Pair('cuda_ops', 'loop'), Pair('cuda_ops', 'copy')),
            )
        )
    return comparisons


COMPARISONS: list[Comparison] = [
    *backbone_comparisons('vmamba-tiny', forward=1.1, training=1.25),
    *backbone_comparisons('vmamba-tiny-s2l5'),
    *backbone_comparisons('vmamba-tiny-v0'),
    *scan_comparisons(states=1),
    *scan_comparisons(states=16),
]
SCALINGS: list[Scaling] = [
    Scaling('vmamba-tiny/sizes', 'forward pass of one image from 224x224 to 1024x1024', 'vmamba-tiny'),
]


def select(patterns: Sequence[str] = ()) -> list[Comparison | Scaling]:
    """The comparisons and scalings whose names match one of the patterns (as in a shell), all of them without any.

    Raises:
        ValueError: a pattern matches nothing.
    """
    everything: list[Comparison | Scaling] = [*COMPARISONS, *SCALINGS]
    for pattern in patterns:
        if not any(fnmatch(each.name, pattern) for each in everything):
            names = ', '.join(each.name for each in everything)
            raise ValueError(f'no comparison is called {pattern!r}; there are {names}')
    return [each for each in everything if not patterns or any(fnmatch(each.name, pattern) for pattern in patterns)]


# --- measuring ---


def run(
    selected: Iterable[Comparison | Scaling], settings: Settings, progress: Callable[[str], None] = lambda line: None
) -> Report:
    """Measure everything selected.

    Args:
        selected: from :func:`select`.
        settings: how to measure.
        progress: told the name of what is measured next.
    """
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    report = Report(describe_machine(settings.device), {'repeats': settings.repeats, 'device': settings.device})
    for each in selected:
        progress(each.name)
        if isinstance(each, Scaling):
            report.scalings.append(measure_scaling(each, settings))
        else:
            report.comparisons.append(measure_comparison(each, settings))
    return report


def measure_comparison(
    comparison: Comparison, settings: Settings, clock: Callable[[], float] = time.perf_counter
) -> dict[str, Any]:
    """Measure a comparison.

    Args:
        comparison: what to compare.
        settings: how to measure.
        clock: seconds since some moment.

    Returns:
        Of JSON's types: median and single seconds of each entry, and each pair's ratio.
    """
    device = torch.device(settings.device)
    calls = {label: prepare(device) for label, prepare in comparison.entries.items()}
    times = measure_in_turns(calls, settings.repeats, device, clock)
    pairs = []
    for pair in comparison.pairs:
        ratios = [ours / theirs for ours, theirs in zip(times[pair.entry], times[pair.against], strict=True)]
        ratio = statistics.median(ratios)
        pairs.append(
            {
                'entry': pair.entry,
                'against': pair.against,
                'ratio': ratio,
                'target': pair.target,
                'met': None if pair.target is None else ratio <= pair.target,
            }
        )
    return {
        'name': comparison.name,
        'summary': comparison.summary,
        'pairs': pairs,
        'entries': {
            label: {'median_s': statistics.median(values), 'times_s': values} for label, values in times.items()
        },
    }


def measure_in_turns(
    calls: Mapping[str, Call], repeats: int, device: torch.device, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each call, ``repeats`` times each, in turns; every second round in the opposite order."""
    loops = {}
    for label, call in calls.items():
        _seconds(call, 1, device, clock)
        loops[label] = max(1, math.ceil(TURN_SECONDS / max(_seconds(call, 1, device, clock), 1e-9)))
    times: dict[str, list[float]] = {label: [] for label in calls}
    order = list(calls)
    for _ in range(repeats):
        for label in order:
            times[label].append(_seconds(calls[label], loops[label], device, clock))
        order.reverse()
    return times


def _seconds(call: Call, loops: int, device: torch.device, clock: Callable[[], float]) -> float:
    _wait(device)
    start = clock()
    for _ in range(loops):
        call()
    _wait(device)
    return (clock() - start) / loops


def _wait(device: torch.device) -> None:
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def measure_scaling(scaling: Scaling, settings: Settings) -> dict[str, Any]:
    """Measure a scaling: times in turns in this process, peak memory in a process of its own for each size.

    Returns:
        Of JSON's types: for each size the seconds and the peak bytes of a forward pass beyond the model's own, and both
        relative to the first size and to the number of pixels, which is 1 where they grow linearly.
    """
    device = torch.device(settings.device)
    calls = {str(size): backbone_call(scaling.backbone, 1, size, False, device) for size in scaling.sizes}
    times = measure_in_turns(calls, settings.repeats, device)
    peaks = [peak_bytes_in_new_process(scaling.backbone, size, settings.device) for size in scaling.sizes]
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


def peak_bytes_in_new_process(backbone: str, size: int, device: str) -> int:
    """:func:`peak_bytes` in a process of its own, which no earlier allocation disturbs."""
    code = (
        'import sys, torch; from ssm_backbones.benchmark import peak_bytes; '
        'torch.set_num_threads(int(sys.argv[4])); print(peak_bytes(sys.argv[1], int(sys.argv[2]), sys.argv[3]))'
    )
    arguments = [sys.executable, '-c', code, backbone, str(size), device, str(torch.get_num_threads())]
    path = os.pathsep.join([str(Path(__file__).resolve().parents[1]), *filter(None, [os.environ.get('PYTHONPATH')])])
    result = subprocess.run(arguments, capture_output=True, text=True, env=os.environ | {'PYTHONPATH': path})
    if result.returncode:
        reason = (result.stderr.strip() or f'it ended with status {result.returncode}').splitlines()[-1]
        raise RuntimeError(f'the peak memory of {backbone} at {size}x{size} could not be measured: {reason}')
    return int(result.stdout.split()[-1])


def peak_bytes(backbone: str, size: int, device: str) -> int:
    """Bytes that a forward pass of one image takes at most beyond the model and the image.

    On the CPU it is the growth of the process's resident memory, for which the process must be a fresh one: memory that
    was freed before and is used again does not show. A small image goes first, for what libraries allocate once.
    """
    where = torch.device(device)
    warm_up = backbone_call(backbone, 1, 64, False, where)
    warm_up()
    call = backbone_call(backbone, 1, size, False, where)
    if where.type == 'cuda':
        torch.cuda.reset_peak_memory_stats(where)
        before = torch.cuda.memory_allocated(where)
        call()
        return torch.cuda.max_memory_allocated(where) - before
    # Linux: the recorded peak falls back to the present size, and what the start-up took no longer counts.
    Path('/proc/self/clear_refs').write_text('5')
    before = _resident_bytes('VmRSS')
    call()
    return _resident_bytes('VmHWM') - before


def _resident_bytes(kind: str) -> int:
    match = re.search(rf'^{kind}:\s+(\d+) kB', Path('/proc/self/status').read_text(), re.MULTILINE)
    if match is None:
        raise RuntimeError(f'/proc/self/status does not tell {kind}')
    return int(match.group(1)) * 1024


def describe_machine(device: str) -> dict[str, Any]:
    """Processor, cores, threads, versions, and the instruction set of the compiled scans."""
    from cuda_ops import _library

    machine: dict[str, Any] = {
        'CPU': _cpu_model(),
        'cores': len(os.sched_getaffinity(0)),
        'threads': torch.get_num_threads(),
    }
    if torch.device(device).type == 'cuda':
        machine['GPU'] = torch.cuda.get_device_name(device)
    machine['scans'] = torch.ops.cuda_ops.cpu_capability() if _library.STATUS.compiled else 'PyTorch reference'
    machine['Python'] = platform.python_version()
    for package in ('torch', 'mmengine', 'mmpretrain'):
        try:
            machine[package] = version(package)
        except PackageNotFoundError:
            machine[package] = 'missing'
    return machine


def _cpu_model() -> str:
    try:
        match = re.search(r'^model name\s*:\s*(.+)$', Path('/proc/cpuinfo').read_text(), re.MULTILINE)
    except OSError:
        match = None
    return match.group(1) if match else platform.processor() or platform.machine()


def write_json(report: Report, path: str | Path) -> None:
    """Write a report, in one step: a file that is there is a whole one."""
    path = Path(path)
    partial_file = path.with_name(f'.{path.name}.partial')
    partial_file.write_text(json.dumps(report.as_dict(), indent=2) + '\n')
    partial_file.replace(path)


# --- the table ---


def _pair_row(comparison: Mapping[str, Any], pair: Mapping[str, Any]) -> list[str]:
    target = '' if pair['target'] is None else f'<= {pair["target"]:g}: {"met" if pair["met"] else "missed"}'
    return [
        comparison['name'],
        pair['entry'],
        _milliseconds(comparison['entries'][pair['entry']]),
        pair['against'],
        _milliseconds(comparison['entries'][pair['against']]),
        f'{pair["ratio"]:.3g}',
        target,
    ]


def _size_row(scaling: Mapping[str, Any], size: Mapping[str, Any]) -> list[str]:
    return [
        scaling['name'],
        f'{size["size"]}x{size["size"]}',
        _milliseconds(size),
        f'{size["time_per_pixel"]:.2f}',
        f'{size["peak_bytes"] / 2**20:.0f}',
        f'{size["peak_per_pixel"]:.2f}',
    ]


def _milliseconds(entry: Mapping[str, Any]) -> str:
    return f'{1000 * entry["median_s"]:.4g}'


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]], text: Sequence[int]) -> str:
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    align = [str.ljust if i in text else str.rjust for i in range(len(header))]
    lines = [[align[i](cell, widths[i]) for i, cell in enumerate(row)] for row in (header, *rows)]
    rule = ['-' * width if i in text else '-' * (width - 1) + ':' for i, width in enumerate(widths)]
    return '\n'.join(f'| {" | ".join(line)} |' for line in (lines[0], rule, *lines[1:]))
