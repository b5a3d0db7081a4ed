"""Reports of measurements, as JSON and as tables."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ssm_backbones.utils.files import write_atomic


@dataclass
class Report:
    """What was measured: ready for JSON, and as tables.

    Attributes:
        machine: See :func:`~ssm_backbones.benchmark.machine.describe_machine`.
        settings: How it was measured.
        comparisons, scalings: The results of what is measured by name.
        models: Those of whole models, a record for each model, resolution and pass.
        ratios: Those of the models that are set against others.
        skipped: What was not measured and why, as dicts of ``name`` and ``reason``.
        failed: Measurements that raised an error, as dicts of ``name`` and ``reason``.
    """

    machine: dict[str, Any]
    settings: dict[str, Any]
    comparisons: list[dict[str, Any]] = field(default_factory=list)
    scalings: list[dict[str, Any]] = field(default_factory=list)
    models: list[dict[str, Any]] = field(default_factory=list)
    ratios: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    failed: list[dict[str, str]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON-serialisable values."""
        return asdict(self)

    def heading(self) -> str:
        """Return a line on the machine and the settings."""
        precision = 'bfloat16 autocast' if self.settings['amp'] else 'float32'
        processor = self.machine.get('GPU') or f'{self.machine["CPU"]}, {self.machine["threads"]} threads'
        return (
            f'{self.settings["of"]}, batch {self.settings["batch_size"]}, {precision}, {processor}, '
            f'torch {self.machine["torch"]}'
        )

    def as_table(self) -> str:
        """Markdown: the machine in a line, the comparisons, the scalings, and what is missing."""
        parts = [machine_line(self.machine)]
        rows = [row for comparison in self.comparisons for row in _comparison_rows(comparison)]
        if rows:
            header = ('comparison', 'entry', 'ms', 'against', 'ms', 'ratio', 'target', 'memory')
            # Only GPUs have the last column.
            shown = len(header) if any(row[-1] for row in rows) else len(header) - 1
            parts.append(markdown(header[:shown], [row[:shown] for row in rows], text=(0, 1, 3)))
        lines = [line for comparison in self.comparisons for line in _detail_lines(comparison)]
        if lines:
            parts.append('\n'.join(lines))
        if self.scalings:
            rows = [_size_row(scaling, size) for scaling in self.scalings for size in scaling['sizes']]
            parts.append(markdown(('scaling', 'image', 'ms', 'per pixel', 'peak MiB', 'per pixel'), rows, text=(0, 1)))
        if self.models:
            rows = [_model_row(each) for each in self.models]
            parts.append(
                markdown(('model', 'pass', 'image', 'batch', 'ms', 'images/s', 'peak MiB'), rows, text=(0, 1, 2))
            )
        if self.ratios:
            rows = [
                (
                    each['model'],
                    each['against'],
                    each['what'],
                    _size(each),
                    f'{each["time_ratio"]:.3g}',
                    f'{each["memory_ratio"]:.3g}',
                )
                for each in self.ratios
            ]
            parts.append(
                markdown(('model', 'against', 'pass', 'image', 'time ratio', 'memory ratio'), rows, text=(0, 1, 2, 3))
            )
        for what, entries in (('skipped', self.skipped), ('failed', self.failed)):
            if entries:
                parts.append('\n'.join(f'{what}: {each["name"]}: {each["reason"]}' for each in entries))
        return '\n\n'.join(parts)


def machine_line(machine: Mapping[str, Any]) -> str:
    """Format the machine as a line."""
    return ', '.join(f'{key} {value}' for key, value in machine.items())


def write_json(report: Any, path: str | Path) -> None:
    """Write a report (any object with ``as_dict``) as JSON, atomically."""
    write_atomic(path, json.dumps(report.as_dict(), indent=2) + '\n')


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], text: Sequence[int]) -> str:
    """Format a table with the columns in ``text`` aligned left, the others right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    align = [str.ljust if i in text else str.rjust for i in range(len(header))]
    lines = [[align[i](cell, widths[i]) for i, cell in enumerate(row)] for row in (header, *rows)]
    rule = ['-' * width if i in text else '-' * (width - 1) + ':' for i, width in enumerate(widths)]
    return '\n'.join(f'| {" | ".join(line)} |' for line in (lines[0], rule, *lines[1:]))


def milliseconds(seconds: float) -> str:
    """Seconds as milliseconds in four digits."""
    return f'{1000 * seconds:.4g}'


def mebibytes(count: int) -> str:
    """Bytes as MiB."""
    return f'{count / 2**20:.0f}'


def _comparison_rows(comparison: Mapping[str, Any]) -> list[tuple[str, ...]]:
    entries = comparison['entries']
    rows: list[tuple[str, ...]] = []
    for pair in comparison['pairs']:
        ours, theirs = entries[pair['entry']], entries[pair['against']]
        memory = ''
        if 'memory_ratio' in pair:
            goal = _goal(pair['memory_target'], pair['memory_met'])
            memory = f'{mebibytes(ours["peak_bytes"])} / {mebibytes(theirs["peak_bytes"])} MiB{goal and ", " + goal}'
        rows.append(
            (
                comparison['name'],
                pair['entry'],
                milliseconds(ours['median_s']),
                pair['against'],
                milliseconds(theirs['median_s']),
                f'{pair["ratio"]:.3g}',
                _goal(pair['target'], pair['met']),
                memory,
            )
        )
    # An entry without its counterpart on this machine still has a time.
    alone = entries.keys() - {label for pair in comparison['pairs'] for label in (pair['entry'], pair['against'])}
    rows += [
        (comparison['name'], label, milliseconds(entry['median_s']), '', '', '', '', '')
        for label, entry in entries.items()
        if label in alone
    ]
    return rows


def _detail_lines(comparison: Mapping[str, Any]) -> list[str]:
    return [
        f'{comparison["name"]}: {label}: {", ".join(f"{what} {value}" for what, value in entry["details"].items())}'
        for label, entry in comparison['entries'].items()
        if 'details' in entry
    ]


def _goal(target: float | None, met: bool | None) -> str:
    return '' if target is None else f'<= {target:.3g}: {"met" if met else "missed"}'


def _model_row(record: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        record['model'],
        record['what'],
        _size(record),
        str(record['batch_size']),
        milliseconds(record['latency_s']),
        f'{record["images_per_s"]:.4g}',
        mebibytes(record['peak_bytes']),
    )


def _size(record: Mapping[str, Any]) -> str:
    return f'{record["height"]}x{record["width"]}'


def _size_row(scaling: Mapping[str, Any], size: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        scaling['name'],
        f'{size["size"]}x{size["size"]}',
        milliseconds(size['median_s']),
        f'{size["time_per_pixel"]:.2f}',
        mebibytes(size['peak_bytes']),
        f'{size["peak_per_pixel"]:.2f}',
    )
