"""The two files that run before the package is installed, loaded as they are then: by their paths."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


def _load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture
def bootstrap() -> ModuleType:
    """tools/bootstrap.py, fresh for each test."""
    return _load('bootstrap_under_test', ROOT / 'tools' / 'bootstrap.py')


@pytest.fixture
def build() -> ModuleType:
    """cuda_ops/_build.py, fresh for each test."""
    return _load('build_under_test', ROOT / 'cuda_ops' / '_build.py')
