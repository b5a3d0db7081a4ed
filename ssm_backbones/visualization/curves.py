"""Read and plot the curves of a training."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ssm_backbones.utils.files import atomic_file


@dataclass
class History:
    """Values that a training logged.

    Attributes:
        losses: For each loss by name, (time, value) in order; epochs are fractional.
        metrics: For each validation metric by name, (time, value) in order.
        unit: Unit of the times: 'epoch' or 'iteration'.
    """

    losses: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    metrics: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    unit: str = 'epoch'


def read_history(work_dir: str | Path) -> History:
    """Read mmengine's scalar logs below a work dir, joining those of a training that was interrupted and resumed.

    If two runs logged the same step, the later run's record is used, because the model continued from it.

    Raises:
        FileNotFoundError: If there are no logs.
    """
    train: dict[int, dict[str, float]] = {}
    val: dict[int, dict[str, float]] = {}
    for log in sorted(Path(work_dir).glob('*/vis_data/scalars.json')):
        for line in log.read_text(encoding='utf-8').splitlines():
            record = json.loads(line)
            (train if 'loss' in record else val)[int(record['step'])] = record
    if not train:
        raise FileNotFoundError(f'no training was logged below {work_dir}')
    by_epoch = all('epoch' in record for record in train.values())
    history = History(unit='epoch' if by_epoch else 'iteration')
    # Training is logged by iteration and validation by the loop's unit; an epoch's last record gives the ratio.
    length = max(record['iter'] / record['epoch'] for record in train.values()) if by_epoch else 1
    for _, record in sorted(train.items()):
        for name, value in record.items():
            if 'loss' in name:
                history.losses.setdefault(name, []).append((record['iter'] / length, value))
    for step, record in sorted(val.items()):
        for name, value in record.items():
            if name not in ('step', 'time', 'data_time'):
                history.metrics.setdefault(name, []).append((step, value))
    return history


def save_curves(
    history: History, metrics: Mapping[str, str], heading: str, path: str | Path, scale: float = 1.0
) -> None:
    """Plot the losses and the validation metrics of a training side by side.

    Args:
        history: The logged values.
        metrics: The metrics to plot: shown name by logged name.
        heading: Title over both plots.
        path: The PNG file to write.
        scale: Factor that converts the metrics to fractions.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), dpi=130, layout='constrained')
    FigureCanvasAgg(figure)
    figure.suptitle(heading, fontsize=13, fontweight='bold', x=0.01, ha='left')
    left, right = figure.subplots(1, 2)
    parts = sorted(name for name in history.losses if name != 'loss')
    for name in ['loss', *parts]:
        times, values = np.array(history.losses[name]).T
        total = name == 'loss'
        left.plot(
            times,
            values,
            label='total' if total else name.replace('loss_', ''),
            linewidth=2.2 if total else 1.2,
            color='#20242c' if total else None,
            alpha=1 if total else 0.85,
        )
    left.set(title='training loss', xlabel=history.unit, ylim=(0, None), xlim=(0, None))
    colours = ('#3c82f0', '#e63c3c', '#3cbe50', '#f5be28')
    for (name, shown), colour in zip(metrics.items(), colours, strict=False):
        points = history.metrics.get(name, [])
        if points:
            times, values = np.array(points).T * [[1], [scale]]
            right.plot(times, values, marker='o', markersize=4, linewidth=2, color=colour, label=shown)
            right.annotate(
                f'{values[-1]:.3f}',
                (times[-1], values[-1]),
                xytext=(6, 0),
                textcoords='offset points',
                va='center',
                color=colour,
                fontsize=9,
            )
    right.set(title='on held-out images', xlabel=history.unit, ylim=(0, 1), xlim=(0, None))
    right.margins(x=0.1)
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[['top', 'right']].set_visible(False)
        if axes.lines:
            axes.legend(frameon=False, fontsize=9)
    with atomic_file(path) as partial:
        figure.savefig(partial, format='png')
