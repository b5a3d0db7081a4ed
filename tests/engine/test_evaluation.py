"""Evaluation by several processes, whose number does not divide that of the images."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
from pathlib import Path

import pytest
import torch

PROCESSES = 3


def launch(port: int, function, *arguments, **options) -> list[int | None]:
    """Call a function in as many forked processes, as torchrun would start them; return their exit codes."""

    def run(rank: int) -> None:
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(PROCESSES),
            MASTER_ADDR='127.0.0.1',
            MASTER_PORT=str(port),
        )
        torch.set_num_threads(1)
        function(*arguments, launcher='pytorch', **options)

    context = multiprocessing.get_context('fork')
    processes = [context.Process(target=run, args=(rank,)) for rank in range(PROCESSES)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(600)
    return [process.exitcode for process in processes]


def names(path: Path) -> list[str]:
    """The images that predictions were made for."""
    if path.is_dir():
        return sorted(file.name for file in path.iterdir())
    with open(path, 'rb') as file:
        return sorted(str(sample['img_path']) for sample in pickle.load(file))


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason='one process is started for each GPU')
@pytest.mark.parametrize('host', ['mmpretrain', 'mmdet', 'mmseg'])
def test_three_processes_gather_each_of_four_images_once(host, train, test, write_config, tmp_path, free_port) -> None:
    short = 'train_cfg = dict(max_iters=1)' if host == 'mmseg' else 'train_cfg = dict(max_epochs=1)'
    hooks = 'default_hooks = dict(checkpoint=dict(interval=1))'
    config = write_config(host, f'{short}\n{hooks}\nval_cfg = val_dataloader = val_evaluator = None')
    train(config, tmp_path / 'trained')
    (checkpoint,) = (tmp_path / 'trained').glob('*_1.pth')
    found = {}
    for kind in ('one', 'three'):
        work_dir, out = str(tmp_path / kind), str(tmp_path / (f'{kind}-maps' if host == 'mmseg' else f'{kind}.pkl'))
        arguments = (config, checkpoint, work_dir, out)
        if kind == 'one':
            metrics = test(*arguments)
        else:
            assert launch(free_port, test, *arguments) == [0] * PROCESSES
            (log,) = Path(work_dir).glob('*/*.json')
            metrics = json.loads(log.read_text())
        found[kind] = names(Path(out)), metrics
    assert len(set(found['one'][0])) == len(found['one'][0]) == 4
    assert found['three'][0] == found['one'][0]
    for name, value in found['one'][1].items():
        assert found['three'][1][name] == pytest.approx(value, rel=1e-4, abs=1e-4, nan_ok=True), name
