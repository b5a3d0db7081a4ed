"""A training that is killed and resumed."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
EPOCHS, LENGTH = 8, 3


def last_epoch_logged(work_dir: Path) -> int:
    """The epoch of the last complete line in the log, 0 where there is none."""
    lines = [line for log in work_dir.glob('*/vis_data/scalars.json') for line in log.read_text().split('\n')[:-1]]
    return max((json.loads(line).get('epoch', 0) for line in lines), default=0)


def test_killed_and_resumed_goes_on_as_if_nothing_had_happened(
    train, write_config, read_losses, environment, tmp_path
) -> None:
    config = str(write_config('mmdet', 'val_cfg = val_dataloader = val_evaluator = None'))
    whole, parts = tmp_path / 'whole', tmp_path / 'parts'
    train(config, whole)
    assert sorted(read_losses(whole)) == list(range(1, EPOCHS * LENGTH + 1))

    command = [sys.executable, str(ROOT / 'tools/train.py'), config, '--work-dir', str(parts), '--resume']
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    try:
        while last_epoch_logged(parts) < 3:
            assert process.poll() is None, 'the training ended before it could be killed'
            time.sleep(0.01)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL
    saved = int((parts / 'last_checkpoint').read_text().removesuffix('.pth').rpartition('_')[2])
    assert 2 <= saved < EPOCHS

    runner = train(config, parts, resume='auto')
    assert (runner.epoch, runner.iter) == (EPOCHS, EPOCHS * LENGTH)
    assert read_losses(parts) == pytest.approx(read_losses(whole), rel=1e-5)
    # The first iteration after the checkpoint was logged by the second run too, so it really went on from there.
    second = max(parts.glob('*/vis_data/scalars.json'))
    first_line = json.loads(second.read_text().partition('\n')[0])
    assert first_line['iter'] == saved * LENGTH + 1
    name = f'epoch_{EPOCHS}.pth'
    expected, got = (torch.load(folder / name)['state_dict'] for folder in (whole, parts))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
