"""Trainings that are killed, or whose disk is full, and resumed: they end at the very same weights."""

import multiprocessing
import os
import random
import resource
import signal
import time
from pathlib import Path

import pytest
import torch

from ssm_backbones.utils.errors import CommandError

# Random numbers in the model and in the data, and each checkpoint replaces the one before.
RANDOM = dict(
    mmpretrain="""
    model = dict(backbone=dict(drop_path_rate=0.5))
    pipeline = [dict(type='LoadImageFromFile'), dict(type='RandomFlip', prob=0.5), dict(type='PackInputs')]
    train_dataloader = dict(num_workers={workers}, dataset=dict(pipeline=pipeline))
    default_hooks = dict(checkpoint=dict(type='CheckpointHook', interval=1, max_keep_ckpts=1))
    randomness = dict(seed={seed})
    val_cfg = val_dataloader = val_evaluator = None
    train_cfg = dict(max_epochs={steps})
""",
    mmseg="""
    model = dict(backbone=dict(drop_path_rate=0.5), decode_head=dict(dropout_ratio=0.5))
    pipeline = [
        dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', reduce_zero_label=True),
        dict(type='RandomFlip', prob=0.5), dict(type='PackSegInputs')]
    train_dataloader = dict(num_workers={workers}, dataset=dict(pipeline=pipeline))
    default_hooks = dict(checkpoint=dict(interval=2, max_keep_ckpts=1))
    randomness = dict(seed={seed})
    train_cfg = dict(max_iters={steps}, val_interval=3)
""",
)


@pytest.fixture
def config(write_config):
    def write(host, steps, workers=0, seed=0):
        return str(write_config(host, RANDOM[host].format(steps=steps, workers=workers, seed=seed)))

    return write


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def weights(work_dir: Path) -> dict[str, torch.Tensor]:
    (checkpoint,) = work_dir.glob('*_*.pth')
    assert not list(work_dir.glob('.*.part'))
    return torch.load(checkpoint, weights_only=True)['state_dict']


def equal(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


class Started:
    """A training in a process that is forked, which costs no imports."""

    def __init__(self, train, *arguments, prepare=lambda: None) -> None:
        def run() -> None:
            torch.set_num_threads(1)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            prepare()
            train(*arguments, resume='auto')

        self.process = multiprocessing.get_context('fork').Process(target=run)
        self.process.start()

    def end(self, number: int | None = None) -> int | None:
        if number is not None and self.process.is_alive():
            os.kill(self.process.pid, number)
        self.process.join(120)
        return self.process.exitcode


@pytest.mark.parametrize(
    ('host', 'workers', 'seed'),
    [
        pytest.param('mmpretrain', 0, None, marks=pytest.mark.slow),
        ('mmseg', 0, 0),
        pytest.param('mmseg', 2, None, marks=pytest.mark.slow),
    ],
)
def test_a_resumed_training_draws_the_same_numbers(host, workers, seed, train, config, one_thread, tmp_path) -> None:
    parts, whole = tmp_path / 'parts', tmp_path / 'whole'
    runner = train(config(host, 2, workers, seed), parts)
    train(config(host, 4, workers, seed), parts, resume='auto')
    train(config(host, 4, workers, runner.seed), whole)
    assert equal(weights(parts), weights(whole))


def wait_for_checkpoint(work_dir: Path, started: Started) -> None:
    while not list(work_dir.glob('*_*.pth')):
        assert started.process.is_alive()
        time.sleep(0.005)


def check_kills(kills, host, workers, steps, train, config, tmp_path) -> None:
    whole, parts, path = tmp_path / 'whole', tmp_path / 'parts', config(host, steps, workers)
    begin = time.monotonic()
    assert Started(train, path, whole).end() == 0
    duration = time.monotonic() - begin
    generator = random.Random(0)
    for kill in range(kills):
        started = Started(train, path, parts)
        # Some before the first checkpoint, most while it trains.
        time.sleep(generator.uniform(0.3, 1.0) * duration)
        started.end(generator.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT]))
        for checkpoint in parts.glob('*_*.pth'):
            torch.load(checkpoint, weights_only=True)
        if kill and (parts / 'last_checkpoint').exists():
            assert list(parts.glob('*_*.pth'))
    assert Started(train, path, parts).end() == 0
    assert equal(weights(parts), weights(whole))


def test_killed_twice_and_resumed(train, config, one_thread, tmp_path) -> None:
    check_kills(2, 'mmpretrain', 0, 4, train, config, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(('host', 'workers'), [('mmpretrain', 0), ('mmpretrain', 2), ('mmseg', 0), ('mmseg', 2)])
def test_killed_at_random_and_resumed(host, workers, train, config, one_thread, tmp_path) -> None:
    check_kills(5, host, workers, 12, train, config, tmp_path)


def test_a_full_disk_leaves_the_last_checkpoint(train, config, one_thread, tmp_path, capfd) -> None:
    """Of a file system or a quota; here of files alone, whose size is limited once there is a first checkpoint."""
    train(config('mmpretrain', 1), tmp_path)
    kept = weights(tmp_path)
    size = (tmp_path / 'epoch_1.pth').stat().st_size // 2

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    started = Started(train, config('mmpretrain', 2), tmp_path, prepare=limit)
    assert started.end() == 1
    assert 'epoch_2.pth cannot be written: File too large' in capfd.readouterr().err
    assert equal(weights(tmp_path), kept)


def test_two_trainings_do_not_share_a_work_dir(train, config, one_thread, tmp_path) -> None:
    started = Started(train, config('mmpretrain', 10000), tmp_path)
    try:
        wait_for_checkpoint(tmp_path, started)
        with pytest.raises(CommandError, match='work_dir .*: another training is writing there'):
            train(config('mmpretrain', 1), tmp_path, resume='auto')
    finally:
        assert started.end(signal.SIGKILL) == -signal.SIGKILL
    (tmp_path / f'.{"0" * 32}.part').write_text('left')
    train(config('mmpretrain', 1), tmp_path)
    assert not list(tmp_path.glob('.*.part'))
