"""The files that run before the package is installed, loaded as they are then: by their paths."""

import importlib
import importlib.util
import sys
from collections.abc import Callable
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
def load_tool() -> Callable[[str], ModuleType]:
    """Loads a file of tools/ that is no part of a package, by its name."""
    return lambda name: _load(name, ROOT / 'tools' / f'{name}.py')


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """tools/setup_commands.py, fresh for each test."""
    monkeypatch.syspath_prepend(str(ROOT / 'tools'))
    for name in ('setup_commands', 'mmcv_setup'):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module('setup_commands')


@pytest.fixture
def bootstrap(commands: ModuleType) -> ModuleType:
    """tools/bootstrap.py, fresh for each test."""
    return _load('bootstrap_under_test', ROOT / 'tools' / 'bootstrap.py')


@pytest.fixture
def build() -> ModuleType:
    """cuda_ops/_build.py, fresh for each test."""
    return _load('build_under_test', ROOT / 'cuda_ops' / '_build.py')
