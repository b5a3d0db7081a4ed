"""Throughput and peak memory of whole models against resolution, as a PNG."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from ssm_backbones.utils.files import atomic_file

_COLOURS = ('#3c82f0', '#e63c3c', '#3cbe50', '#aa50dc', '#f5be28', '#8a8f9a')
_STYLES = ('-', '--')
_QUANTITIES = (('images_per_s', 'images a second', 1), ('peak_bytes', 'peak memory, MiB', 2**20))


def draw_models(records: Sequence[Mapping[str, Any]], heading: str) -> Any:
    """Draw images per second and peak memory over image size, with a curve for each model and pass.

    Args:
        records: ``Report.models``.
        heading: Title of the figure.

    Returns:
        Matplotlib's figure.

    Raises:
        ValueError: If there are no records.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, StrMethodFormatter

    if not records:
        raise ValueError('nothing was measured that could be drawn')
    figure = Figure(figsize=(11, 4.6), dpi=130, layout='constrained')
    figure.suptitle(heading, fontsize=11)
    models = list(dict.fromkeys(record['model'] for record in records))
    passes = list(dict.fromkeys(record['what'] for record in records))
    sizes = sorted(
        {(record['height'] * record['width'], f'{record["height"]}x{record["width"]}') for record in records}
    )
    for axes, (key, label, unit) in zip(figure.subplots(1, 2), _QUANTITIES, strict=True):
        for number, model in enumerate(models):
            for style, what in zip(_STYLES, passes, strict=False):
                points = sorted(
                    (record['height'] * record['width'], record[key] / unit)
                    for record in records
                    if (record['model'], record['what']) == (model, what)
                )
                if points:
                    axes.plot(
                        *zip(*points, strict=True),
                        style,
                        marker='o',
                        color=_COLOURS[number % len(_COLOURS)],
                        label=f'{model}, {what}',
                    )
        axes.set_xscale('log')
        axes.set_yscale('log')
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter('{x:g}'))
        axes.set_xticks([pixels for pixels, _ in sizes], [name for _, name in sizes], rotation=30)
        axes.minorticks_off()
        axes.set(xlabel='image, height x width', ylabel=label)
        axes.grid(alpha=0.3, which='both')
    figure.axes[0].legend(fontsize=8)
    return figure


def plot_models(records: Sequence[Mapping[str, Any]], heading: str, path: str | os.PathLike[str]) -> None:
    """Write :func:`draw_models` as a PNG, atomically."""
    with atomic_file(path) as partial:
        draw_models(records, heading).savefig(partial, format='png')
