"""Training by FSDP2: weights, logs and checkpoints are those of a training that divides nothing."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from ssm_backbones.engine.fsdp2 import FSDP2Strategy, check_fsdp2
from ssm_backbones.utils.errors import CommandError
from ssm_backbones.utils.torch_compat import release

pytestmark = pytest.mark.skipif(release() < (2, 6), reason='fully_shard is public since torch 2.6')

TOOLS = Path(__file__).resolve().parents[2] / 'tools'
# Gradients near zero have a sign by rounding, which AdamW would follow with whole steps.
PLAIN = """
    model = dict(backbone=dict(drop_path_rate=0.0, frozen_stages={frozen}))
    optim_wrapper = dict(optimizer=dict(eps=1e-3), clip_grad=dict(max_norm=0.1))
    val_cfg = val_dataloader = val_evaluator = None
    train_dataloader = dict(batch_size={batch})
    train_cfg = dict(max_epochs={epochs})
"""
SHARDED = """
    runner_type = 'FlexibleRunner'
    strategy = dict(type='FSDP2Strategy', activation_checkpointing=True)
"""


def check_same(one: Path, other: Path) -> None:
    """Two checkpoints have the same entries, and the same weights and optimizer states to rounding."""
    first, second = (torch.load(path, weights_only=False) for path in (one, other))
    assert first.keys() == second.keys()
    assert first['meta'].keys() - second['meta'].keys() <= {'experiment_name', 'mmengine_version'}
    assert first['state_dict'].keys() == second['state_dict'].keys()
    for name, value in first['state_dict'].items():
        torch.testing.assert_close(second['state_dict'][name], value, rtol=2e-3, atol=2e-5, msg=name)
    states = [checkpoint['optimizer']['state'] for checkpoint in (first, second)]
    assert states[0].keys() == states[1].keys() and len(states[0]) > 10
    for number, state in states[0].items():
        assert state.keys() == states[1][number].keys()
        for name, value in state.items():
            torch.testing.assert_close(states[1][number][name], value, rtol=2e-2, atol=1e-6, msg=f'{number} {name}')


def norms(work_dir: Path) -> list[float]:
    found = {}
    for log in sorted(work_dir.glob('*/vis_data/scalars.json')):
        found.update({record['iter']: record['grad_norm'] for record in map(json.loads, log.read_text().splitlines())})
    return [found[number] for number in sorted(found)]


@pytest.fixture
def started(monkeypatch, free_port) -> None:
    """As torchrun starts one process."""
    for name, value in dict(RANK=0, WORLD_SIZE=1, LOCAL_RANK=0, MASTER_ADDR='127.0.0.1', MASTER_PORT=free_port).items():
        monkeypatch.setenv(name, str(value))


def test_one_process_writes_and_reads_ordinary_checkpoints(train, write_config, tmp_path, started) -> None:
    settings = PLAIN.format(batch=6, epochs=2, frozen=1)
    plain, sharded = write_config('mmpretrain', settings), write_config('mmpretrain', settings + SHARDED)
    train(plain, tmp_path / 'plain')
    epoch = {'train_cfg.max_epochs': 1}
    train(sharded, tmp_path / 'sharded', launcher='pytorch', cfg_options=epoch)
    check_same(tmp_path / 'plain' / 'epoch_1.pth', tmp_path / 'sharded' / 'epoch_1.pth')
    # Each goes on where the other one was.
    train(sharded, tmp_path / 'on', launcher='pytorch', resume=str(tmp_path / 'plain' / 'epoch_1.pth'))
    check_same(tmp_path / 'plain' / 'epoch_2.pth', tmp_path / 'on' / 'epoch_2.pth')
    train(plain, tmp_path / 'back', resume=str(tmp_path / 'sharded' / 'epoch_1.pth'))
    check_same(tmp_path / 'plain' / 'epoch_2.pth', tmp_path / 'back' / 'epoch_2.pth')
    expected = norms(tmp_path / 'plain')
    assert norms(tmp_path / 'sharded') + norms(tmp_path / 'on') == pytest.approx(expected, rel=1e-3)


def dist_train(config: Path, work_dir: Path, processes: int, environment: dict[str, str], *arguments: object) -> None:
    command = [TOOLS / 'dist_train.sh', config, processes, '--work-dir', work_dir, *arguments]
    result = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=1800)
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason='one process is started for each GPU')
def test_any_number_of_processes_goes_on(train, write_config, tmp_path, environment, free_port) -> None:
    environment |= {'PORT': str(free_port), 'OMP_NUM_THREADS': '1'}
    # Six images a step, divided by two processes, by three, and by none.
    config = {
        batch: write_config(
            'mmpretrain', PLAIN.format(batch=batch, epochs=3, frozen=-1) + (SHARDED if batch < 6 else '')
        )
        for batch in (3, 2, 6)
    }
    train(config[6], tmp_path / 'alone')
    work_dir, until = tmp_path / 'shared', '--cfg-options'
    dist_train(config[3], work_dir, 2, environment, until, 'train_cfg.max_epochs=1')
    dist_train(config[2], work_dir, 3, environment, '--resume', until, 'train_cfg.max_epochs=2')
    train(config[6], work_dir, resume='auto')
    # Two checkpoints are kept.
    for epoch in (2, 3):
        check_same(tmp_path / 'alone' / f'epoch_{epoch}.pth', work_dir / f'epoch_{epoch}.pth')
    # The norm is that of all processes' gradients.
    assert norms(work_dir) == pytest.approx(norms(tmp_path / 'alone'), rel=1e-2)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason='one process is started for each GPU')
@pytest.mark.parametrize(('host', 'last'), [('mmdet', 'epoch_1.pth'), ('mmseg', 'iter_2.pth')])
def test_detectors_and_segmentors_in_bfloat16(host, last, test, write_config, tmp_path, environment, free_port) -> None:
    length = 'max_epochs=1, val_interval=1' if host == 'mmdet' else 'max_iters=2, val_interval=2'
    changes = SHARDED.replace('activation', "param_dtype='bfloat16', activation") + f'    train_cfg = dict({length})\n'
    if host == 'mmseg':
        changes += '    default_hooks = dict(checkpoint=dict(interval=2))\n'
    config = write_config(host, changes)
    dist_train(config, tmp_path / 'work', 2, environment | {'PORT': str(free_port), 'OMP_NUM_THREADS': '1'})
    (log,) = (tmp_path / 'work').glob('*/vis_data/scalars.json')
    records = [json.loads(line) for line in log.read_text().splitlines()]
    measured = {name: value for record in records if 'loss' not in record for name, value in record.items()}
    # The same config tests with whole models, in float32.
    metrics = test(config, tmp_path / 'work' / last, tmp_path / 'test')
    name = 'coco/bbox_mAP' if host == 'mmdet' else 'aAcc'
    assert measured[name] == pytest.approx(metrics[name], rel=0.1, abs=0.02)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(runner_type='Runner'), "set runner_type='FlexibleRunner'"),
        (dict(launcher='none'), 'tools/dist_train.sh'),
        (dict(custom_hooks=[dict(type='mmpretrain.EMAHook')]), 'remove EMAHook'),
        (dict(optim_wrapper=dict(type='AmpOptimWrapper', optimizer=dict())), "param_dtype='bfloat16'"),
        (dict(optim_wrapper=dict(type='mmengine.AmpOptimWrapper', optimizer=dict())), "param_dtype='bfloat16'"),
        (dict(optim_wrapper=dict(constructor='Several')), 'one optimizer'),
        (dict(compile=True), 'remove compile'),
        (dict(val_cfg=dict(fp16=True)), 'remove val_cfg.fp16'),
        (dict(val_cfg=dict(), model=dict(test_cfg=dict(mode='slide'))), "test_cfg.mode='whole'"),
        (dict(detect_anomaly=True), 'detect_anomaly'),
    ],
)
def test_what_does_not_work_is_refused_first(changes, message) -> None:
    cfg = dict(
        runner_type='FlexibleRunner',
        strategy=dict(type='FSDP2Strategy'),
        optim_wrapper=dict(optimizer=dict()),
        model=dict(),
        launcher='pytorch',
        detect_anomaly=False,
    )
    for given in (cfg, cfg | changes):
        options = {name: given[name] for name in ('launcher', 'detect_anomaly')}
        if given is cfg:
            check_fsdp2(Config(given), **options)
            continue
        with pytest.raises(CommandError, match=message):
            check_fsdp2(Config(given), **options)
    check_fsdp2(Config(cfg | changes | dict(strategy=dict(type='DDPStrategy'))), **options)


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(ValueError, match="param_dtype must be None or 'bfloat16', got 'float16'"):
        FSDP2Strategy(param_dtype='float16')
