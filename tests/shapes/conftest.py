"""A small generated data set that the tests of this folder share."""

from pathlib import Path

import pytest

from ssm_backbones.shapes.generate import make_shapes
from ssm_backbones.shapes.options import ShapesOptions


@pytest.fixture(scope='session')
def options() -> ShapesOptions:
    """Enough images for all kinds of annotation, in sizes that differ."""
    return ShapesOptions(seed=7, train=40, val=12, size=(96, 128), max_size=(128, 171))


@pytest.fixture(scope='session')
def root(options: ShapesOptions, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data set on disk, in all formats."""
    folder = tmp_path_factory.mktemp('shapes')
    make_shapes(folder, options)
    return folder
