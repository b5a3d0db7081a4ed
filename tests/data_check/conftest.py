"""The check on altered copies of the generated data."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from mmengine.config import Config

from ssm_backbones.apis.config import load_config
from ssm_backbones.data_check import ERROR, Finding, check_data
from tests.host_runs import TEMPLATES

FOLDERS = {'mmdet': 'coco', 'mmseg': 'ade20k', 'mmpretrain': 'imagenet'}
Change = Callable[[Path], Any]
Check = Callable[..., list[Finding]]


@pytest.fixture(scope='session')
def loaded(write_config) -> Callable[[str], Config]:
    """A tiny config of each library, read once."""
    read: dict[str, Config] = {}

    def load(host: str) -> Config:
        if host not in read:
            read[host] = load_config(write_config(host))
        return deepcopy(read[host])

    assert set(FOLDERS) == set(TEMPLATES)
    return load


@pytest.fixture
def check(loaded, shapes, tmp_path) -> Check:
    """Checks a copy of the generated data after a change, with options on top of the tiny config."""

    def run(
        host: str,
        change: Change | None = None,
        options: Mapping[str, Any] | None = None,
        modes: Iterable[str] = ('train', 'val'),
        **kwargs: Any,
    ) -> list[Finding]:
        cfg = loaded(host)
        folder = tmp_path / FOLDERS[host]
        shutil.copytree(shapes / FOLDERS[host], folder)
        if change is not None:
            change(folder)
        roots = {f'{mode}_dataloader.dataset.data_root': f'{folder}/' for mode in ('train', 'val', 'test')}
        if host == 'mmdet':
            roots['val_evaluator.ann_file'] = f'{folder}/annotations/instances_val2017.json'
        cfg.merge_from_dict(roots)
        for key, value in (options or {}).items():
            if isinstance(value, Mapping) and 'data_prefix' in value:
                value = {**value, 'data_prefix': value['data_prefix'].replace('{root}', str(folder))}
            cfg.merge_from_dict({key: value})
        return check_data(cfg, tuple(modes), **kwargs)

    return run


def errors(findings: list[Finding]) -> list[str]:
    """The errors among the findings, as they are printed."""
    return [str(finding) for finding in findings if finding.severity == ERROR]


def edit(change: Callable[[dict[str, Any]], Any], *splits: str) -> Change:
    """A change of the annotation files of the splits, both by default."""

    def edited(folder: Path) -> None:
        for split in splits or ('train', 'val'):
            path = folder / 'annotations' / f'instances_{split}2017.json'
            content = json.loads(path.read_text())
            change(content)
            path.write_text(json.dumps(content))

    return edited
