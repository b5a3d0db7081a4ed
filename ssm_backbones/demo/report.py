"""Report of the demos: results and images in one self-contained HTML file."""

from __future__ import annotations

import base64
import html
import io
import json
import platform
from collections.abc import Mapping
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch

from ssm_backbones.demo.catalogue import DEMOS
from ssm_backbones.utils.files import write_atomic

REPORT = 'report.html'
RESULTS = 'results.json'
# File, heading and caption; images that a run has not written are left out.
_IMAGES = (
    ('predictions.png', 'Predictions', 'Held-out images: the truth beside what the model finds.'),
    ('curves.png', 'Training', 'Losses on the training images, metrics on the held-out ones.'),
    (
        'erf.png',
        'Effective receptive field',
        'How much each pixel changes the features at the centre, before and after training; log scale.',
    ),
    (
        'features.png',
        'Feature maps',
        'Three principal components of each level as red, green and blue: alike in colour is alike in features.',
    ),
)
_PACKAGES = ('torch', 'numpy', 'mmengine', 'mmcv', 'mmdet', 'mmdetection', 'mmsegmentation', 'mmpretrain')
_JPEG_QUALITY = 88
_WIDEST = 1600

_STYLE = """
:root { color-scheme: light dark; --ink: #20242c; --muted: #626a78; --paper: #ffffff; --card: #f4f6f9; --line: #d9dee6;
  --accent: #2563c9; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaee; --muted: #9aa3b2; --paper: #15181d; --card: #1e232b;
  --line: #333a46; --accent: #7fb0ff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 72rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.9rem; margin: 0; } h2 { margin: 3rem 0 .25rem; font-size: 1.45rem; }
h3 { margin: 1.75rem 0 .25rem; font-size: 1.1rem; } p { margin: .25rem 0 .75rem; color: var(--muted); }
nav a, a { color: var(--accent); } nav { margin: 1rem 0; display: flex; flex-wrap: wrap; gap: .25rem 1rem; }
.figures { display: flex; flex-wrap: wrap; gap: .75rem; margin: 1rem 0; padding: 0; list-style: none; }
.figures li { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .6rem 1rem; }
.figures b { display: block; font-size: 1.6rem; line-height: 1.2; } .figures span { color: var(--muted); }
img { display: block; width: 100%; height: auto; border: 1px solid var(--line); border-radius: .4rem;
  background: #fff; }
table { border-collapse: collapse; margin: .5rem 0; } td, th { text-align: left; padding: .25rem 1.5rem .25rem 0;
  border-bottom: 1px solid var(--line); font-weight: 400; } th { color: var(--muted); }
code { font-family: ui-monospace, monospace; font-size: .9em; }
"""


def describe_run() -> dict[str, str]:
    """Return versions and machine, for the page."""
    installed = {name.lower(): each.version for each in distributions() if (name := each.metadata['Name'])}
    found = {'Python': platform.python_version()}
    for name in _PACKAGES:
        # The maintained forks have the same names with a prefix.
        for distribution in (name, f'onedl-{name}'):
            if distribution in installed:
                found[distribution] = installed[distribution]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f'CPU, {torch.get_num_threads()} threads'
    return found | {'device': device}


def write_report(folder: str | Path) -> Path:
    """Write ``report.html`` about every finished demo below a folder.

    Args:
        folder: Folder with a subfolder ``<family>-<task>`` for each demo, with ``results.json`` and images.

    Returns:
        The path of the page.

    Raises:
        FileNotFoundError: If the folder has no finished demo.
    """
    folder = Path(folder)
    runs = {key: folder / '-'.join(key) for key in DEMOS if (folder / '-'.join(key) / RESULTS).is_file()}
    if not runs:
        raise FileNotFoundError(f'no finished demo in {folder}: none of its folders holds {RESULTS}')
    sections = [_section(*key, run) for key, run in runs.items()]
    links = ''.join(f'<a href="#{family}-{task}">{family}, {task}</a>' for family, task in runs)
    page = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<title>ssm_backbones: demos</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n'
        '<h1>ssm_backbones: demos</h1>\n'
        '<p>Small models, trained from nothing on generated images, for a look at what the backbones do.</p>\n'
        f'<nav>{links if len(runs) > 1 else ""}</nav>\n' + '\n'.join(sections) + '\n</body>\n</html>\n'
    )
    path = folder / REPORT
    write_atomic(path, page)
    return path


def _section(family: str, task: str, run: Path) -> str:
    demo = DEMOS[family, task]
    results: dict[str, Any] = json.loads((run / RESULTS).read_text(encoding='utf-8'))
    figures = ''.join(
        f'<li><b>{results["figures"][name]:.3f}</b><span>{html.escape(shown)}</span></li>'
        for name, shown in demo.task.figures.items()
    )
    images = ''.join(
        f'<h3>{heading}</h3>\n<p>{text}</p>\n<img alt="{heading}" src="{_inline(run / name)}">\n'
        for name, heading, text in _IMAGES
        if (run / name).is_file()
    )
    seconds = {name: f'{value:.1f} s' for name, value in results['seconds'].items()}
    return (
        f'<section id="{family}-{task}">\n<h2>{family}: {demo.task.summary}</h2>\n'
        f'<p><code>{html.escape(demo.config)}</code></p>\n<ul class="figures">{figures}</ul>\n{images}'
        f'<h3>Time</h3>\n{_table(seconds)}<h3>Versions</h3>\n{_table(results["versions"])}</section>'
    )


def _table(rows: Mapping[str, str]) -> str:
    cells = ''.join(
        f'<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>' for name, value in rows.items()
    )
    return f'<table>{cells}</table>\n'


def _inline(path: Path) -> str:
    """Encode an image as a data URL, as JPEG of at most the page's width."""
    from PIL import Image

    buffer = io.BytesIO()
    with Image.open(path) as opened:
        image = opened.convert('RGB')
        image.thumbnail((_WIDEST, _WIDEST * 4))
        image.save(buffer, format='JPEG', quality=_JPEG_QUALITY)
    return 'data:image/jpeg;base64,' + base64.b64encode(buffer.getvalue()).decode('ascii')
