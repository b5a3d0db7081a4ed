"""A training that is killed and resumed."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ssm_backbones.checkpoints.files import CheckpointError

ROOT = Path(__file__).resolve().parents[2]
EPOCHS, LENGTH = 8, 3


def last_epoch_logged(work_dir: Path) -> int:
    """The epoch of the last complete line in the log, 0 where there is none."""
    lines = [line for log in work_dir.glob('*/vis_data/scalars.json') for line in log.read_text().split('\n')[:-1]]
    return max((json.loads(line).get('epoch', 0) for line in lines), default=0)


@pytest.mark.slow
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


SHORT = """
    val_cfg = val_dataloader = val_evaluator = None
    train_cfg = dict(max_epochs={epochs})
    param_scheduler = [dict(type='CosineAnnealingLR', by_epoch=True, begin=0, end=2, convert_to_iter_based=True)]
    model = dict(backbone=dict(frozen_stages={frozen}))
    optim_wrapper = dict(constructor={constructor!r}, paramwise_cfg={paramwise})
    train_dataloader = dict(batch_size={batch}, persistent_workers=True)
"""
LAYERWISE = dict(constructor='LayerDecayOptimWrapperConstructor', paramwise='dict(layer_decay_rate=0.9)')
GROUPED = 'GroupedOptimWrapperConstructor'
PLAIN = dict(constructor='DefaultOptimWrapperConstructor', paramwise='dict()')


def short(write_config, epochs, frozen=-1, batch=4, constructor=PLAIN):
    return write_config('mmpretrain', SHORT.format(epochs=epochs, frozen=frozen, batch=batch, **constructor))


@pytest.mark.parametrize(('before', 'after'), [(-1, 1), (1, -1)])
def test_other_stages_may_be_frozen(before, after, train, write_config, tmp_path) -> None:
    train(short(write_config, 1, before), tmp_path)
    runner = train(short(write_config, 2, after), tmp_path, resume='auto')
    assert runner.epoch == 2
    first, last = (torch.load(tmp_path / f'epoch_{epoch}.pth')['state_dict'] for epoch in (1, 2))
    moved = {name for name in first if not torch.equal(first[name], last[name])}
    stem = {name for name in moved if name.startswith('backbone.patch_embed')}
    assert moved and bool(stem) == (after == -1)


def test_groups_of_other_parameters_are_refused_in_one_line(train, write_config, tmp_path) -> None:
    train(short(write_config, 1, 1, constructor=LAYERWISE), tmp_path)
    with pytest.raises(CheckpointError, match='cannot be resumed from: its optimizer has .* Other frozen_stages'):
        train(short(write_config, 2, -1, constructor=LAYERWISE), tmp_path, resume='auto')


def test_a_group_for_each_parameter_is_carried_on_by_the_constructor_that_is_named(
    train, write_config, tmp_path
) -> None:
    each = dict(constructor='DefaultOptimWrapperConstructor', paramwise="dict(custom_keys={'head': dict(lr_mult=2.0)})")
    train(short(write_config, 1, constructor=each), tmp_path)
    few = short(write_config, 2, constructor=each | dict(constructor=GROUPED))
    with pytest.raises(CheckpointError, match='optim_wrapper.constructor=DefaultOptimWrapperConstructor to go on'):
        train(few, tmp_path, resume='auto')
    options = {'optim_wrapper.constructor': 'DefaultOptimWrapperConstructor'}
    assert train(few, tmp_path, resume='auto', cfg_options=options).epoch == 2


def test_other_members_of_groups_of_equal_sizes_are_refused(train, write_config, tmp_path) -> None:
    def decaying(name, epochs):
        keys = f"dict(custom_keys={{'{name}': dict(lr_mult=2.0)}})"
        return short(write_config, epochs, constructor=dict(constructor=GROUPED, paramwise=keys))

    train(decaying('dt_bias', 1), tmp_path)
    assert train(decaying('dt_bias', 2), tmp_path, resume='auto').epoch == 2
    with pytest.raises(CheckpointError, match='parameters in 2 groups, .* in 2, of other members. Other frozen_stages'):
        train(decaying('mixer.D', 3), tmp_path, resume='auto')


def test_another_batch_size_is_logged_with_what_it_means(train, write_config, tmp_path) -> None:
    train(short(write_config, 1), tmp_path)
    runner = train(short(write_config, 2, batch=2), tmp_path, resume='auto')
    assert runner.epoch == 2 and runner.train_dataloader.num_workers == 0
    log = max(tmp_path.glob('*/*.log')).read_text()
    assert 'CosineAnnealingLR goes on to iteration 6, as it was saved, not to 12' in log
    assert 'the batch size was 4 and is 2 now' in log
