"""The shell scripts that start several processes."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / 'tools'


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason='one process is started for each GPU, of which there may be one')
def test_dist_train_and_test_share_the_work(write_config, environment, tmp_path, free_port) -> None:
    changes = 'train_cfg = dict(max_epochs=1)\nval_cfg = val_dataloader = val_evaluator = None'
    config, work_dir = str(write_config('mmpretrain', changes)), tmp_path / 'work'
    environment = {**environment, 'PORT': str(free_port)}
    subprocess.run(
        [TOOLS / 'dist_train.sh', config, '2', '--work-dir', work_dir], env=environment, check=True, timeout=300
    )
    (log,) = work_dir.glob('*/vis_data/scalars.json')
    records = [json.loads(line) for line in log.read_text().splitlines()]
    # Twelve images in batches of four, for two processes.
    assert [record['iter'] for record in records] == [1, 2]
    out = tmp_path / 'predictions.pkl'
    command = [TOOLS / 'dist_test.sh', config, work_dir / 'epoch_1.pth', '2', '--work-dir', work_dir, '--out', out]
    result = subprocess.run(command, env=environment, timeout=300, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert 'accuracy/top1' in result.stdout
    assert out.is_file()


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="on GPUs SyncBN is PyTorch's own")
def test_upernet_trains_with_two_cpu_processes(shapes, environment, tmp_path, free_port) -> None:
    config, work_dir = ROOT / 'configs/vmamba/vmamba-nano_upernet_demo_shapes.py', tmp_path / 'work'
    data = shapes / 'ade20k'
    options = [
        'model.decode_head.channels=16',
        'model.auxiliary_head.channels=16',
        'model.decode_head.norm_cfg.type=SyncBN',
        'model.auxiliary_head.norm_cfg.type=SyncBN',
        'train_cfg.max_epochs=1',
        'train_cfg.val_interval=9',
        'train_dataloader.batch_size=2',
        'train_dataloader.dataset.indices=9',  # two steps of two images for each, and an image that is left
        'train_dataloader.num_workers=0',
        'train_dataloader.persistent_workers=False',
        f'train_dataloader.dataset.data_root={data}',
        f'val_dataloader.dataset.data_root={data}',
        'default_hooks.logger.interval=1',
    ]
    command = [TOOLS / 'dist_train.sh', config, '2', '--work-dir', work_dir, '--cfg-options', *options]
    result = subprocess.run(
        command, env={**environment, 'PORT': str(free_port)}, timeout=300, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    saved = torch.load(work_dir / 'epoch_1.pth', weights_only=False)['state_dict']
    # Every normalisation has seen both steps, and goes by the names that SyncBN has.
    counts = {int(value) for name, value in saved.items() if name.endswith('num_batches_tracked')}
    assert counts == {2}


def test_slurm_train_starts_the_job(environment, tmp_path) -> None:
    (tmp_path / 'srun').write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / 'srun').chmod(0o755)
    environment = {
        **environment,
        'PATH': f'{tmp_path}{os.pathsep}{environment["PATH"]}',
        'GPUS': '16',
        'SRUN_ARGS': '--exclusive --mem=0',
        'PYTHON': 'python3',
    }
    arguments = ['part', 'job', 'a config.py', 'w', '--resume', '--cfg-options', 'a=b c']
    output = subprocess.run(
        [TOOLS / 'slurm_train.sh', *arguments], env=environment, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    assert {'--partition=part', '--job-name=job', '--ntasks=16', '--gres=gpu:8', '--exclusive', '--mem=0'} <= set(
        output
    )
    start = output.index('python3')
    assert output[start:] == [
        'python3', '-u', str(TOOLS / 'train.py'), 'a config.py', '--work-dir=w', '--launcher=slurm', '--resume',
        '--cfg-options', 'a=b c',
    ]  # fmt: skip


@pytest.mark.parametrize('script', ['dist_train.sh', 'dist_test.sh', 'slurm_train.sh'])
def test_too_few_arguments(script) -> None:
    result = subprocess.run([TOOLS / script, 'config.py'], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith('usage: ') and 'CONFIG' in result.stderr
