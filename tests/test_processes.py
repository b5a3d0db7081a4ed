"""The scans in several threads and processes, and what importing the package costs."""

from __future__ import annotations

import importlib
import multiprocessing
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from tests.ops.helpers import run_python
from tests.pytorch_tools.models import build, images
from tests.scan_dataset import scan


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_models_in_several_threads_of_one_to_eight_change_no_bit(threads) -> None:
    """Threads of Python, each with its own autograd and as many threads of the kernels as are set."""

    expected = scan(0)
    with ThreadPoolExecutor(4) as pool:
        for count in (1, 2, 5, 8):
            threads(count)
            for found in pool.map(scan, [0] * 4):
                assert torch.equal(found, expected), count
    threads(1)
    # Building a model seeds torch's one generator, so that only what follows is done by several threads.
    models = [build('vmamba') for _ in range(2)]
    with ThreadPoolExecutor(2) as pool, torch.no_grad():
        one, other = pool.map(lambda model: model(images()), models)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(
    'method',
    ['fork', pytest.param('forkserver', marks=pytest.mark.slow), pytest.param('spawn', marks=pytest.mark.slow)],
)
def test_data_loader_workers_compute_the_same(method, threads, monkeypatch) -> None:
    # A started worker imports the data set's module, by a name that no other project's "tests" can take.
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    scans = importlib.import_module('scan_dataset').Scans()
    # The parent has threads of its own by then, which a forked worker lacks.
    threads(2)
    expected = [scan(seed) for seed in range(4)]
    loader = DataLoader(scans, batch_size=1, num_workers=2, multiprocessing_context=method, timeout=120)
    for found, value in zip(loader, expected, strict=True):
        assert torch.equal(found[0], value)


def test_a_forked_process_does_not_deadlock(threads) -> None:
    """With one thread, as DataLoader's workers and torchrun's processes have; OpenMP's own threads do not survive."""
    threads(2)
    scan(0)

    def child() -> None:
        torch.set_num_threads(1)
        scan(0)

    process = multiprocessing.get_context('fork').Process(target=child)
    process.start()
    process.join(120)
    alive = process.is_alive()
    process.kill()
    assert not alive and process.exitcode == 0


IMPORT = """
import time, torch
try:
    import mmengine.model, mmengine.runner
except ModuleNotFoundError:
    pass
begin = time.process_time()
import ssm_backbones
print(time.process_time() - begin)
"""


def test_importing_the_package_takes_little_time() -> None:
    """In processor time, which other processes do not lengthen; the bound has room for slower machines."""
    result = run_python(IMPORT)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) < 1.5
