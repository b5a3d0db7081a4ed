"""Trainings on several nodes, and jobs of which a process is killed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

TOOLS = Path(__file__).resolve().parents[2] / 'tools'
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason='one process is started for each GPU'),
]
ADDRESSES = ('10.231.77.1', '10.231.77.2')
QUICK = """
    val_cfg = val_dataloader = val_evaluator = None
    train_cfg = dict(max_epochs={epochs})
"""


@pytest.fixture
def nodes() -> Iterator[list[str]]:
    """Two network namespaces joined by a cable, as two machines are; the names."""
    names = [f'ssm-{os.getpid()}-{number}' for number in range(2)]

    def ip(*arguments: str) -> None:
        subprocess.run(['ip', *arguments], check=True, capture_output=True)

    with contextlib.ExitStack() as stack:
        try:
            for name in names:
                ip('netns', 'add', name)
                stack.callback(subprocess.run, ['ip', 'netns', 'delete', name], check=False)
            ip('link', 'add', 'cable', 'netns', names[0], 'type', 'veth', 'peer', 'name', 'cable', 'netns', names[1])
            for name, address in zip(names, ADDRESSES, strict=True):
                ip('-n', name, 'address', 'add', f'{address}/30', 'dev', 'cable')
                ip('-n', name, 'link', 'set', 'cable', 'up')
                ip('-n', name, 'link', 'set', 'lo', 'up')
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f'network namespaces are not allowed here: {error}')
        yield names


def test_two_nodes_train_together(nodes, write_config, environment, tmp_path) -> None:
    config, work_dir = str(write_config('mmpretrain', QUICK.format(epochs=1))), tmp_path / 'work'
    environment |= {'NNODES': '2', 'MASTER_ADDR': ADDRESSES[0], 'GLOO_SOCKET_IFNAME': 'cable', 'OMP_NUM_THREADS': '1'}
    jobs = [
        subprocess.Popen(
            ['ip', 'netns', 'exec', name, TOOLS / 'dist_train.sh', config, '1', '--work-dir', work_dir],
            env={**environment, 'NODE_RANK': str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, name in enumerate(nodes)
    ]
    outputs = [job.communicate(timeout=900)[0] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], outputs[0][-3000:] + outputs[1][-3000:]
    (log,) = work_dir.glob('*/vis_data/scalars.json')
    # Twelve images in batches of four, for two nodes.
    assert [json.loads(line)['iter'] for line in log.read_text().splitlines()] == [1, 2]


def workers(job: subprocess.Popen) -> list[int]:
    """The processes that torchrun has started, in the order of their ranks."""
    children = Path(f'/proc/{job.pid}/task/{job.pid}/children').read_text().split()
    return [int(child) for child in children]


def test_a_killed_worker_ends_the_job_and_it_is_resumed(write_config, environment, tmp_path, free_port) -> None:
    config, work_dir = str(write_config('mmpretrain', QUICK.format(epochs=10000))), tmp_path / 'work'
    environment |= {'PORT': str(free_port), 'OMP_NUM_THREADS': '1'}
    command = [TOOLS / 'dist_train.sh', config, '2', '--work-dir', work_dir]
    job = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        while not (work_dir / 'last_checkpoint').exists():
            assert job.poll() is None, job.stdout.read()
            time.sleep(0.1)
        started = workers(job)
        os.kill(started[1], signal.SIGKILL)
        begin = time.monotonic()
        output = job.communicate(timeout=300)[0]
        assert time.monotonic() - begin < 60
    finally:
        job.kill()
    assert job.returncode != 0 and 'SIGKILL' in output
    assert not [pid for pid in started if Path(f'/proc/{pid}').exists()]
    saved = int((work_dir / 'last_checkpoint').read_text().removesuffix('.pth').rpartition('_')[2])
    epochs = ['--cfg-options', f'train_cfg.max_epochs={saved + 1}']
    result = subprocess.run(
        [*command, '--resume', *epochs], env=environment, capture_output=True, text=True, timeout=900
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert (work_dir / f'epoch_{saved + 1}.pth').is_file()
