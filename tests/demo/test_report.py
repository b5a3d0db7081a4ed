"""The demos' page."""

import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssm_backbones.demo.catalogue import DEMOS
from ssm_backbones.demo.report import describe_run, write_report

CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
# Red, green, blue: to be found again on the page.
COLOURS = {'predictions.png': (200, 30, 30), 'curves.png': (30, 160, 30), 'features.png': (30, 30, 200)}


def finish(folder: Path, family: str, task: str, value: float = 0.625) -> None:
    """Leave what a finished demo leaves."""
    run = folder / f'{family}-{task}'
    run.mkdir()
    for name, colour in COLOURS.items():
        Image.new('RGB', (2000, 600), colour).save(run / name)
    figures = dict.fromkeys(DEMOS[family, task].task.figures, value)
    results = {'figures': figures, 'seconds': {'training': 12.34}, 'versions': {'torch': '9.9 <cpu>'}}
    (run / 'results.json').write_text(json.dumps(results))


class Page(HTMLParser):
    """What a page shows, and what it would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.links: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs) -> None:
        attributes = dict(attrs)
        self.sources += [attributes[name] for name in ('src', 'srcset', 'data') if name in attributes]
        self.links += [attributes['href']] if 'href' in attributes else []
        if tag not in ('meta', 'img'):
            self.open.append(tag)

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        self.words.append(data)


def test_page_holds_every_finished_demo_and_loads_nothing(tmp_path) -> None:
    finish(tmp_path, 'v2m', 'seg', 0.5)
    finish(tmp_path, 'vmamba', 'det')
    (tmp_path / 'mamba2d-cls').mkdir()
    path = write_report(tmp_path)
    assert path == tmp_path / 'report.html'
    text = path.read_text(encoding='utf-8')
    page = Page(text)
    assert page.open == []
    assert len(page.sources) == 6 and all(source.startswith('data:image/jpeg;base64,') for source in page.sources)
    assert page.links == ['#vmamba-det', '#v2m-seg']
    assert not re.search(r'https?:|url\(|@import|<script', text)
    shown = ' '.join(page.words)
    for word in ('0.625', '0.500', 'box AP', 'mIoU', '12.3 s', '9.9 <cpu>', 'configs/vmamba/'):
        assert word in shown
    assert 'mamba2d' not in shown
    assert sorted(each.name for each in tmp_path.iterdir()) == ['mamba2d-cls', 'report.html', 'v2m-seg', 'vmamba-det']


def test_no_page_without_a_finished_demo(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match='no finished demo in'):
        write_report(tmp_path)


def test_versions_are_those_of_the_installed_packages() -> None:
    import torch

    versions = describe_run()
    assert versions['torch'].partition('+')[0] == torch.__version__.partition('+')[0]
    assert any(name.endswith('mmengine') for name in versions)
    assert len(versions) >= 8


@pytest.mark.skipif(CHROMIUM is None, reason='needs Chromium on the path')
def test_page_looks_right_in_a_browser(tmp_path) -> None:
    finish(tmp_path, 'vmamba', 'cls')
    page = write_report(tmp_path)
    shot = tmp_path / 'page.png'
    command = [
        CHROMIUM,
        '--headless',
        '--no-sandbox',
        '--disable-gpu',
        '--no-first-run',
        '--disable-background-networking',
        '--disable-component-update',
        '--disable-sync',
        '--hide-scrollbars',
        f'--user-data-dir={tmp_path / "profile"}',
        '--window-size=900,1700',
        f'--screenshot={shot}',
        page.as_uri(),
    ]
    environment = {**os.environ, 'HOME': str(tmp_path)}
    subprocess.run(command, check=True, capture_output=True, timeout=120, env=environment)
    seen = np.asarray(Image.open(shot).convert('RGB')).astype(int)
    tops = []
    for colour in COLOURS.values():
        rows, columns = np.nonzero(np.abs(seen - colour).max(axis=2) < 12)
        # All of the image, as wide as the text and in its proportions.
        width, height = np.ptp(columns) + 1, np.ptp(rows) + 1
        assert 800 < width < 900 and abs(width / height - 2000 / 600) < 0.1
        tops.append(rows.min())
    assert tops == sorted(tops)
    # Words in dark ink above the first image, on paper.
    head = seen[: tops[0]]
    assert (head.max(axis=2) < 90).sum() > 500 and (head.min(axis=2) > 240).mean() > 0.7
