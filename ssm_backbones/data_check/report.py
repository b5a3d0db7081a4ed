"""Findings as text, and counts as a picture."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from ssm_backbones.data_check.check import Report
from ssm_backbones.data_check.finding import ERROR, SEVERITIES, Finding

_MOST = 10


def error_message(findings: Sequence[Finding]) -> str:
    """Return the errors among the findings, a line for each; empty if there are none."""
    errors = [finding for finding in findings if finding.severity == ERROR]
    lines = [str(finding) for finding in errors[:_MOST]]
    if len(errors) > _MOST:
        lines.append(f'... and {len(errors) - _MOST} more')
    return '\n'.join(lines) if len(lines) < 2 else '\n  '.join([f'the data have {len(errors)} errors:', *lines])


def as_table(findings: Sequence[Finding], width: int = 120) -> str:
    """Return the findings as a table: how many, what, and below it where and what to do."""
    lines = []
    for severity in SEVERITIES:
        for finding in findings:
            if finding.severity != severity:
                continue
            where = f'{finding.file}, {finding.id}' if finding.id else finding.file
            heads = [f'{severity:<8}{finding.count:>8}  ', ' ' * 18]
            for text in (f'{finding.value}.', where, finding.remedy):
                lines.extend(
                    textwrap.wrap(
                        text,
                        width,
                        initial_indent=heads.pop(0) if len(heads) > 1 else heads[0],
                        subsequent_indent=' ' * 18,
                        break_long_words=False,
                        break_on_hyphens=False,
                    )
                )
    return '\n'.join([f'{"":8}{"number":>8}  what, where, remedy', *lines]) if lines else 'nothing was found'


def draw_counts(report: Report) -> Any:
    """Draw the counts of each data set by class and size, as horizontal bars.

    Returns:
        Matplotlib's figure.

    Raises:
        ValueError: If nothing was counted.
    """
    from matplotlib.figure import Figure

    counted = {key: counts for key, counts in report.counts.items() if counts}
    if not counted:
        raise ValueError('nothing was counted that could be drawn')
    most = max(len(counts) for counts in counted.values())
    figure = Figure(figsize=(5.5 * len(counted), 1.2 + 0.24 * most), dpi=110, layout='constrained')
    for axes, (key, counts) in zip(figure.subplots(1, len(counted), squeeze=False)[0], counted.items(), strict=True):
        names = list(counts)
        left = [0] * len(names)
        for size in dict.fromkeys(size for sizes in counts.values() for size in sizes):
            values = [counts[name].get(size, 0) for name in names]
            axes.barh(range(len(names)), values, left=left, label=size or None)
            left = [before + value for before, value in zip(left, values, strict=True)]
        # Names with $ are no formulas.
        axes.set_yticks(range(len(names)), names, fontsize=8, parse_math=False)
        axes.invert_yaxis()
        axes.set_xlabel(report.unit)
        axes.set_title(key, fontsize=9)
        if report.unit == 'objects':
            axes.legend(fontsize=8)
    return figure
