"""DDP, FSDP2 and distributed checkpoints of every family in several processes; ``processes.py`` is what each does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ssm_backbones.utils.torch_compat import release
from tests.pytorch_tools.models import FAMILIES, build

pytestmark = pytest.mark.skipif(release() < (2, 6), reason='fully_shard is public since torch 2.6')

ROOT = Path(__file__).resolve().parents[2]


def run(folder: Path, processes: int, *arguments: str | Path) -> None:
    folder.mkdir()
    script = Path(__file__).with_name('processes.py')
    environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
    workers = [
        subprocess.Popen(
            [sys.executable, script, folder, str(rank), str(processes), *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(processes)
    ]
    outputs = [worker.communicate(timeout=600)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * processes, outputs[0][-3000:]


def check_saved(folder: Path) -> None:
    """What several processes saved is loaded by one, without a process group."""
    import torch.distributed.checkpoint as dcp

    for name in FAMILIES:
        state = build(name, seed=1).state_dict()
        dcp.load(state, checkpoint_id=folder / name)
        expected = build(name).state_dict()
        assert all(torch.equal(state[key], value) for key, value in expected.items()), name


@pytest.fixture(scope='module')
def two(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('processes') / '2'
    run(folder, 2, 'sample')
    return folder


@pytest.mark.filterwarnings('ignore:torch.distributed is disabled')
def test_two_processes_compute_what_one_does_and_one_loads_their_checkpoint(two) -> None:
    check_saved(two)


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore:torch.distributed is disabled')
def test_three_processes_in_every_way_load_the_checkpoint_of_two(two) -> None:
    run(two.with_name('3'), 3, 'all', two)
    check_saved(two.with_name('3'))
