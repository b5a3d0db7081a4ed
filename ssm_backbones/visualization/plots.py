"""Figures of receptive fields, activation maps and scan responses, as PNG files.

Images are uint8 (H, W, 3), RGB, the model's input. A pixel of a map is drawn over the square of ``stride`` pixels that
it covers. Files are written atomically.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ssm_backbones.utils.files import atomic_file
from ssm_backbones.visualization.receptive_field import ReceptiveField
from ssm_backbones.visualization.scan_response import ScanResponse

SHARES = (0.5, 0.95)
_COLOURS = ('#8a8f9a', '#e63c3c', '#3c82f0', '#3cbe50', '#f5be28', '#aa50dc')
_FAINTEST = 1e-4
_PANEL = 3.3
_NEVER = '#d9dce3'


def draw_receptive_fields(fields: Mapping[str, ReceptiveField], path: str | os.PathLike[str], heading: str) -> None:
    """Draw effective receptive fields side by side as heat maps, with their cumulative curves.

    Each heat map is relative to its largest value, on a logarithmic scale; squares hold 50 % and 95 % of the
    contribution.

    Args:
        fields: The fields by the names of their models, untrained ones first.
        path: The file to write.
        heading: Title of the figure.

    Raises:
        ValueError: If there are no fields.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.patches import Rectangle

    if not fields:
        raise ValueError('there are no receptive fields to draw.')
    aspects = [field.field.shape[0] / field.field.shape[1] for field in fields.values()]
    figure, panels = _figure(len(fields) + 1, max(*aspects, 0.75), heading, size=4.1)
    curves = panels[-1]
    drawn, norm = None, LogNorm(_FAINTEST, 1)
    for axes, colour, (name, field) in zip(panels, _cycle(), fields.items(), strict=False):
        values = np.maximum(field.field / field.field.max(), _FAINTEST)
        drawn = axes.imshow(values, norm=norm, cmap='inferno', interpolation='nearest')
        row, column = field.centre
        for share, style in zip(SHARES, ('-', '--'), strict=True):
            side = field.side(share)
            axes.add_patch(
                Rectangle(
                    (column - side / 2, row - side / 2),
                    side,
                    side,
                    fill=False,
                    edgecolor='white',
                    linewidth=1.3,
                    linestyle=style,
                )
            )
        height, width = field.field.shape
        sides = ', '.join(f'{share:.0%} in {field.side(share):g} px' for share in SHARES)
        axes.set_title(f'{name}\n{sides}', fontsize=11)
        axes.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
        axes.tick_params(labelsize=8)
        # The curve starts at 0, for an empty square.
        sides_at, shares = field.curve()
        curves.plot([0, *sides_at], [0, *shares], color=colour, linewidth=2, label=name)
    bar = figure.colorbar(drawn, ax=panels[:-1], fraction=0.05, pad=0.02)
    bar.set_label('contribution relative to the largest', fontsize=9)
    bar.ax.tick_params(labelsize=8)
    for share, style in zip(SHARES, ('-', '--'), strict=True):
        curves.axhline(share, color='#b0b5c0', linewidth=1, linestyle=style, zorder=0)
        curves.annotate(
            f'{share:.0%}',
            (1, share),
            xycoords=('axes fraction', 'data'),
            fontsize=8,
            color='#787e8a',
            xytext=(-2, 2),
            textcoords='offset points',
            ha='right',
        )
    curves.set_title('share of the contribution\nwithin a centred square', fontsize=11)
    curves.set(xlabel='side of the square (pixels)', ylim=(0, 1.02), xlim=(0, None))
    curves.grid(alpha=0.25)
    curves.spines[['top', 'right']].set_visible(False)
    curves.legend(frameon=False, fontsize=9, loc='lower right')
    _save(figure, path)


def draw_activation_maps(
    image: np.ndarray,
    maps: Mapping[str, np.ndarray],
    strides: Sequence[int],
    path: str | os.PathLike[str],
    heading: str,
    unit: str = '',
    channels: Sequence[int] | None = None,
) -> None:
    """Draw activation maps over an image: a column for each stage, and a row for each chosen channel.

    Args:
        image: What the model was given, uint8 (H, W, 3), RGB.
        maps: As :func:`~ssm_backbones.visualization.activation_maps` gives them, by the names of the stages.
        strides: The stride of each of the maps.
        path: The file to write.
        heading: Title of the figure.
        unit: What the colour bars measure.
        channels: The numbers of the channels, where the maps are of channels.

    Raises:
        ValueError: If there are no maps.
    """
    if not maps:
        raise ValueError('there are no activation maps to draw.')
    rows = 1 if channels is None else len(channels)
    figure, panels = _figure(len(maps) + 1, image.shape[0] / image.shape[1], heading, rows=rows)
    for row in range(rows):
        first, *others = panels[row * (len(maps) + 1) : (row + 1) * (len(maps) + 1)]
        if row == 0:
            _show_image(first, image, f'model input, {image.shape[1]}x{image.shape[0]}')
        else:
            first.axis('off')
        for axes, (name, value), stride in zip(others, maps.items(), strides, strict=True):
            value = value if channels is None else value[row]
            colours = value.ndim == 3
            title = f'{name}, {value.shape[1]}x{value.shape[0]}'
            _show_image(axes, image, title if channels is None else f'{title}\nchannel {channels[row]}', grey=True)
            signed = channels is not None
            # Many backbones have a few outlier pixels; the scale is that of the others.
            low, high = (0.0, 255.0) if colours else np.percentile(value, (1, 99)).tolist()
            if signed:
                high = max(abs(low), abs(high))
                low = -high
            drawn = axes.imshow(
                value,
                cmap='RdBu_r' if signed else 'turbo',
                vmin=low,
                vmax=high,
                alpha=0.85 if colours else 0.62,
                interpolation='nearest',
                extent=_extent(value, stride),
            )
            _fit(axes, image)
            if not colours:
                bar = figure.colorbar(drawn, ax=axes, fraction=0.046, pad=0.03, extend='both')
                bar.ax.tick_params(labelsize=8)
                bar.solids.set_alpha(1)
                if axes is others[-1]:
                    bar.set_label(unit, fontsize=9)
    _save(figure, path)


def draw_scan_response(
    image: np.ndarray, response: ScanResponse, stride: int, path: str | os.PathLike[str], heading: str
) -> None:
    """Draw a pixel's response through a scan: the image, all paths together, and each alone, on one scale.

    Weights are relative to the largest one of another pixel, on a logarithmic scale. The pixel's own weight, which
    includes the skip weight D, is in the title and marked. Pixels that no path reaches are grey.

    Args:
        image: What the model was given, uint8 (H, W, 3), RGB.
        response: The weights.
        stride: The stride of the map.
        path: The file to write.
        heading: Title of the figure.
    """
    from matplotlib.colors import LogNorm

    row, column = response.point
    panels_of = {'all together': response.total} if len(response.names) > 1 else {}
    panels_of |= dict(zip(response.names, response.paths, strict=True))
    largest = max(
        [np.delete(value.ravel(), row * value.shape[1] + column).max(initial=0) for value in panels_of.values()]
    )
    largest = largest or 1.0
    per_row = 3 if len(panels_of) > 2 else len(panels_of) + 1
    figure, panels = _figure(
        per_row, image.shape[0] / image.shape[1], heading, rows=-(-(len(panels_of) + 1) // per_row)
    )
    centre = ((column + 0.5) * stride - 0.5, (row + 0.5) * stride - 0.5)
    _show_image(
        panels[0],
        image,
        f'model input, and the pixel at row {row}, column {column}\nof a map of '
        f'{response.total.shape[1]}x{response.total.shape[0]}',
    )
    _mark(panels[0], centre)
    drawn, norm = None, LogNorm(_FAINTEST, 1)
    for axes, (name, value) in zip(panels[1:], panels_of.items(), strict=False):
        relative = value / largest
        shown = np.ma.masked_where(relative == 0, np.maximum(relative, _FAINTEST))
        axes.set_facecolor(_NEVER)
        drawn = axes.imshow(shown, norm=norm, cmap='inferno', interpolation='nearest', extent=_extent(value, stride))
        _mark(axes, centre)
        _fit(axes, image)
        axes.set_title(f'{name}\nitself: {relative[row, column]:.3g}', fontsize=11)
        axes.tick_params(labelsize=8)
    for axes in panels[1 + len(panels_of) :]:
        axes.axis('off')
    bar = figure.colorbar(drawn, ax=panels, fraction=0.03, pad=0.02, extend='max')
    bar.set_label("weight relative to the largest of another pixel's", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    _save(figure, path)


def _figure(columns: int, aspect: float, heading: str, rows: int = 1, size: float = _PANEL) -> tuple[Any, list[Any]]:
    """Create a figure with room for titles and colour bars; return it with its axes, row by row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    wide = max(columns * (size + 0.7), 6.5)
    figure = Figure(figsize=(wide, rows * (size * min(aspect, 2.5) + 0.7) + 0.8), dpi=130, layout='constrained')
    FigureCanvasAgg(figure)
    figure.suptitle(heading, fontsize=13, fontweight='bold', x=0.01, ha='left')
    return figure, list(np.ravel(figure.subplots(rows, columns, squeeze=False)))


def _cycle() -> Iterator[str]:
    while True:
        yield from _COLOURS


def _show_image(axes: Any, image: np.ndarray, title: str, grey: bool = False) -> None:
    shown = image.mean(axis=2).astype(np.uint8) if grey else image
    axes.imshow(shown, cmap='gray' if grey else None, vmin=0, vmax=255)
    axes.set_title(title, fontsize=11)
    axes.tick_params(labelsize=8)


def _extent(value: np.ndarray, stride: int) -> tuple[float, float, float, float]:
    height, width = value.shape[:2]
    return -0.5, width * stride - 0.5, height * stride - 0.5, -0.5


def _fit(axes: Any, image: np.ndarray) -> None:
    """Limit axes to the image: maps of odd images extend beyond it by less than a pixel of the map."""
    height, width = image.shape[:2]
    axes.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5), aspect='equal')


def _mark(axes: Any, centre: tuple[float, float]) -> None:
    axes.plot(*centre, marker='+', markersize=13, markeredgewidth=3.4, color='white')
    axes.plot(*centre, marker='+', markersize=12, markeredgewidth=1.6, color='#1e9bff')


def _save(figure: Any, path: str | os.PathLike[str]) -> None:
    with atomic_file(path) as partial:
        figure.savefig(partial, format='png')
