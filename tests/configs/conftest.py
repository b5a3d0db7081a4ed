"""Stand-ins for ImageNet, COCO 2017 and ADE20K in their true layouts, at the places where the configs look."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from mmdet.datasets import CocoDataset

from ssm_backbones.shapes.classes import WNIDS
from ssm_backbones.shapes.generate import make_shapes
from ssm_backbones.shapes.options import ShapesOptions

IMAGENET_CLASSES = 1000


def _coco(source: Path, target: Path) -> None:
    # COCO's own category ids have gaps; the shapes take the names of the first six.
    source.rename(target)
    for path in target.glob('annotations/*.json'):
        content = json.loads(path.read_text())
        names = CocoDataset.METAINFO['classes']
        content['categories'] = [dict(id=index + 1 + (index > 10), name=name) for index, name in enumerate(names)]
        path.write_text(json.dumps(content))


def _ade20k(source: Path, target: Path) -> None:
    target.parent.mkdir()
    source.rename(target)


def _imagenet(source: Path, target: Path) -> None:
    # train/SYNSET/ for all 1000 synsets; val/ flat with its labels in meta/val.txt.
    for label in range(IMAGENET_CLASSES):
        (target / 'train' / f'n{label + 1:08d}').mkdir(parents=True)
    for wnid in WNIDS:
        for image in (source / 'train' / wnid).iterdir():
            image.rename(target / 'train' / wnid / image.name)
    (target / 'val').mkdir()
    (target / 'meta').mkdir()
    lines = []
    for image in sorted((source / 'val').glob('*/*.JPEG')):
        name = f'ILSVRC2012_val_{len(lines) + 1:08d}.JPEG'
        lines.append(f'{name} {WNIDS.index(image.parent.name)}\n')
        image.rename(target / 'val' / name)
    (target / 'meta' / 'val.txt').write_text(''.join(lines))
    shutil.rmtree(source)


@pytest.fixture(scope='session', autouse=True)
def _quick_starts(quick_starts: None) -> None:
    """For every run."""


@pytest.fixture(autouse=True)
def _seed_transforms() -> None:
    """The libraries' transforms draw from these."""
    random.seed(0)
    np.random.seed(0)


@pytest.fixture(scope='session')
def standins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``data/imagenet``, ``data/coco`` and ``data/ade/ADEChallengeData2016``."""
    folder = tmp_path_factory.mktemp('standins')
    shapes = folder / 'shapes'
    make_shapes(shapes, ShapesOptions(seed=1, train=6, val=2, size=(96, 96), max_size=(96, 128)))
    data = folder / 'data'
    data.mkdir()
    _coco(shapes / 'coco', data / 'coco')
    _ade20k(shapes / 'ade20k', data / 'ade' / 'ADEChallengeData2016')
    _imagenet(shapes / 'imagenet', data / 'imagenet')
    return folder


@pytest.fixture
def beside_data(standins: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder is the one in which the configs find ``data/``."""
    monkeypatch.chdir(standins)
    return standins
