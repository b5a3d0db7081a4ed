"""What all tests share."""

import functools
import importlib.util
import logging
import os
import socket
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

pytest_plugins = ['tests.host_runs']

if 'PYTEST_XDIST_WORKER_COUNT' in os.environ:
    # Processes that test side by side share the cores, as do the processes that they start.
    _threads = max(1, (os.cpu_count() or 1) // int(os.environ['PYTEST_XDIST_WORKER_COUNT']))
    os.environ.setdefault('OMP_NUM_THREADS', str(_threads))
    torch.set_num_threads(_threads)


def _forget_runs() -> None:
    # mmengine keeps loggers, visualizers, message hubs and the default scope for the whole process; a command has one
    # run. A process that never imported mmengine, for the ops need none, has nothing to forget.
    manager = sys.modules.get('mmengine.utils.manager')
    kinds = [manager.ManagerMixin] if manager else []
    while kinds:
        kind = kinds.pop()
        kinds.extend(kind.__subclasses__())
        kind._instance_dict.clear()


@pytest.fixture(autouse=True)
def _start_afresh() -> None:
    """Every test starts from the same random state and without a run's leftovers, whichever ran before it."""
    torch.manual_seed(0)
    _forget_runs()


@pytest.fixture(scope='session')
def forget_runs() -> Callable[[], None]:
    """Makes the next run in a test like the first one of a process."""
    return _forget_runs


@pytest.fixture(scope='session')
def quick_starts() -> Iterator[None]:
    """What mmengine does anew at the start of every run and is the same each time: once for all runs of the tests.

    It formats the config several times, for the log and the copies, and asks the compilers for their versions.
    """
    from mmengine.config import config
    from mmengine.runner import runner
    from yapf.yapflib import yapf_api

    formatted: dict[str, tuple[str, bool]] = {}
    format_code, collect_env = yapf_api.FormatCode, functools.cache(runner.collect_env)

    def format_once(text: str, **options: Any) -> tuple[str, bool]:
        if text not in formatted:
            formatted[text] = format_code(text, **options)
        return formatted[text]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(yapf_api, 'FormatCode', format_once)
        if hasattr(config, 'FormatCode'):  # OpenMMLab's has it from the start, the fork imports it each time
            patch.setattr(config, 'FormatCode', format_once)
        patch.setattr(runner, 'collect_env', lambda: collect_env().copy())
        yield


@pytest.fixture
def log() -> Iterator[list[str]]:
    """What mmengine's current logger, which hands nothing on to its parents, is told in a test."""
    from mmengine.logging import MMLogger

    lines: list[str] = []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = MMLogger.get_current_instance()
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)


@pytest.fixture(scope='module')
def tool(request: pytest.FixtureRequest) -> ModuleType:
    """The command line whose file a test module names TOOL, as a module, so that no test needs a process for it."""
    spec = importlib.util.spec_from_file_location(f'{request.module.TOOL.stem}_tool', request.module.TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        return free.getsockname()[1]
