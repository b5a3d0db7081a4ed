"""The demo, on a tiny scale."""

import dataclasses
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from PIL import Image

from ssm_backbones import demo
from ssm_backbones.demo import images as demo_images
from ssm_backbones.demo import run as demo_run
from ssm_backbones.shapes.classes import CLASSES, SEG_CLASSES
from ssm_backbones.shapes.options import ShapesOptions
from ssm_backbones.utils import torch_compat
from ssm_backbones.utils.errors import CommandError
from ssm_backbones.visualization.curves import read_history
from ssm_backbones.visualization.sheets import save_contact_sheet

ROOT = Path(__file__).resolve().parents[2]


SHORT = {
    'det': ('mmdet', 'train_cfg = dict(max_epochs=4, val_interval=2)'),
    'seg': (
        'mmseg',
        """
        train_cfg = dict(max_iters=4, val_interval=2)
        default_hooks = dict(checkpoint=dict(interval=2))
        test_dataloader = dict(dataset=dict(data_prefix=dict(
            img_path='images/validation', seg_map_path='annotations/validation')))
        """,
    ),
    'cls': ('mmpretrain', 'train_cfg = dict(max_epochs=2, val_interval=1)'),
}


@pytest.fixture
def checkout(tmp_path, monkeypatch, write_config, environment) -> Path:
    """A folder like a checkout's root, whose demos of VMamba are tiny, and trained by one process."""
    monkeypatch.setattr(demo_run, '_processes', lambda batch_size: 1)
    for name in ('tools', 'configs', 'ssm_backbones', 'cuda_ops'):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for task, (host, changes) in SHORT.items():
        row = demo.DEMOS['vmamba', task]
        config = write_config(host, changes, data=Path('data/shapes'))
        options = ShapesOptions(seed=3, train=12, val=4, size=(64, 64))
        tiny = demo.Demo(dataclasses.replace(row.task, options=options), str(config))
        monkeypatch.setitem(demo.DEMOS, ('vmamba', task), tiny)
    return tmp_path


def killed_after_the_first_epoch(command, threads) -> int:
    process = subprocess.Popen(command)
    work_dir = Path(command[command.index('--work-dir') + 1])
    while not (work_dir / 'last_checkpoint').exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    return process.wait()


@pytest.mark.slow
def test_demo_is_interrupted_carried_on_reported_and_renewed(checkout, monkeypatch, capfd, forget_runs) -> None:
    out = checkout / 'demo' / 'vmamba-det'
    with monkeypatch.context() as patch, pytest.raises(CommandError, match='carries on from the last checkpoint'):
        patch.setattr(demo_run, '_run', killed_after_the_first_epoch)
        demo.run_demo()
    assert not (out / 'results.json').exists()
    capfd.readouterr()

    forget_runs()
    figures = demo.run_demo()
    assert set(figures) == {'coco/bbox_mAP', 'coco/segm_mAP'}
    written = {path.name for path in out.iterdir() if not path.name.startswith('.')}
    assert written == {
        'train',
        'predictions.png',
        'curves.png',
        'features',
        'features.png',
        'erf.png',
        'model.pth',
        'results.json',
        'fingerprint',
    }
    assert (out.parent / 'report.html').is_file()
    lines = capfd.readouterr().out.splitlines()
    assert any('resumed epoch: ' in line for line in lines)
    assert any('eta: ' in line for line in lines)
    assert lines[-1].startswith(
        f'box AP {figures["coco/bbox_mAP"]:.3f}, mask AP {figures["coco/segm_mAP"]:.3f} on held-out'
    )
    assert lines[-1].endswith('see demo/report.html, and predictions.png, curves.png and model.pth in demo/vmamba-det/')

    checkpoint = (out / 'model.pth').stat()
    assert demo.run_demo() == figures
    assert 'Finished before' in capfd.readouterr().out
    assert (out / 'model.pth').stat() == checkpoint

    config = Path(demo.DEMOS['vmamba', 'det'].config)
    config.write_text(config.read_text().replace('max_epochs=4', 'max_epochs=1'))
    forget_runs()
    demo.run_demo()
    assert 'Starting over: data or config have changed' in capfd.readouterr().out
    assert (out / 'train' / 'epoch_1.pth').is_file() and not (out / 'train' / 'epoch_4.pth').exists()


@pytest.mark.parametrize('deaf', [pytest.param(False, marks=pytest.mark.slow), True])
def test_being_asked_to_end_ends_the_training(deaf, tmp_path, environment) -> None:
    child = f"""
import os, pathlib, signal, time
if {deaf}:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))
time.sleep(300)
"""
    parent = f"""
import subprocess, sys
from ssm_backbones.cli import run_command
from ssm_backbones.demo import run
wait = subprocess.Popen.wait
subprocess.Popen.wait = lambda self, timeout=None: wait(self, timeout and 1)
sys.exit(run_command(lambda: run._run([sys.executable, '-c', {child!r}], 1)))
"""
    process = subprocess.Popen([sys.executable, '-c', parent], env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (tmp_path / 'pid').exists() or not (tmp_path / 'pid').read_text():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    pid = int((tmp_path / 'pid').read_text())
    process.terminate()
    assert 'interrupted' in process.communicate(timeout=60)[1]
    assert process.returncode == 130
    # Killed at the latest; whoever adopted it may still have to take note.
    status = Path(f'/proc/{pid}/stat')
    deadline = time.monotonic() + 10
    while status.exists() and status.read_text().rpartition(')')[2].split()[0] != 'Z':
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    ('task', 'last', 'shown'),
    [
        ('seg', 'iter_4.pth', ('mIoU', 'mean class accuracy', 'pixel accuracy')),
        ('cls', 'epoch_2.pth', ('accuracy',)),
    ],
)
def test_other_tasks(checkout, capfd, monkeypatch, task, last, shown) -> None:
    drawn = []

    def save(pairs, *args, **kwargs) -> None:
        drawn.extend(pairs)
        save_contact_sheet(pairs, *args, **kwargs)

    monkeypatch.setattr(demo_images, 'save_contact_sheet', save)
    figures = demo.run_demo('vmamba', task)
    out = checkout / 'demo' / f'vmamba-{task}'
    assert (out / 'train' / last).is_file()
    assert all(0 <= value <= 1 for value in figures.values())
    reached = ', '.join(f'{name} {value:.3f}' for name, value in zip(shown, figures.values(), strict=True))
    assert capfd.readouterr().out.splitlines()[-1].startswith(f'{reached} on held-out images')
    # All four held-out images, each with its truth, are on the sheet.
    assert len(drawn) == 4
    sheet = np.asarray(Image.open(out / 'predictions.png'))
    lines = [line.tobytes() for line in sheet]
    for image in [image for pair in drawn for image in pair]:
        middle = image[len(image) // 2].tobytes()
        assert any(middle in line for line in lines)
    history = read_history(out / 'train')
    assert history.losses and all(np.isfinite(loss) for loss in np.concatenate([*history.losses.values()])[:, 1])
    assert len(history.metrics) >= len(shown)
    with Image.open(out / 'curves.png') as curves:
        assert len(curves.convert('RGB').getcolors(1 << 24)) > len(history.losses)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason='on GPUs one process trains')
def test_two_processes_share_the_batch(checkout, monkeypatch, capfd) -> None:
    monkeypatch.setattr(demo_run, '_processes', lambda batch_size: 2)
    figures = demo.run_demo('vmamba', 'cls')
    assert 0 <= figures['accuracy/top1'] <= 1
    assert '--nproc-per-node 2 tools/train.py' in capfd.readouterr().out
    (log,) = (checkout / 'demo' / 'vmamba-cls' / 'train').glob('*/vis_data/config.py')
    written, shared = Config.fromfile(demo.DEMOS['vmamba', 'cls'].config), Config.fromfile(log)
    assert 2 * shared.train_dataloader.batch_size == written.train_dataloader.batch_size


@pytest.mark.parametrize(
    ('gpu', 'threads', 'batch_size', 'processes'),
    [(False, 2, 8, 2), (False, 16, 8, 2), (False, 1, 8, 1), (False, 2, 3, 1), (True, 2, 8, 1)],
)
def test_how_many_processes_train(gpu, threads, batch_size, processes, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: gpu)
    monkeypatch.setattr(torch, 'get_num_threads', lambda: threads)
    assert demo_run._processes(batch_size) == processes


@pytest.mark.parametrize('processes', [1, 2])
def test_the_training_command(processes) -> None:
    command = demo_run._training_command('a.py', Path('out'), processes, 8)
    assert ('ssm_backbones.utils.launch' in command) == (processes == 2)
    assert ('train_dataloader.batch_size=4' in command) == (processes == 2)
    assert ('optim_wrapper.optimizer.fused=True' in command) == torch_compat.HAS_FUSED_ADAMW
    assert command[command.index('--work-dir') + 1] == 'out' and '--resume' in command


@pytest.mark.parametrize(
    ('gpu', 'threads', 'processes', 'here'),
    [(False, 1, 1, True), (False, 2, 2, True), (False, 2, 1, False), (False, 16, 2, False), (True, 1, 1, False)],
)
def test_images_are_read_by_the_training_where_no_core_is_left(gpu, threads, processes, here, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: gpu)
    monkeypatch.setattr(torch, 'get_num_threads', lambda: threads)
    command = demo_run._training_command('a.py', Path('out'), processes, 8)
    assert ('train_dataloader.num_workers=0' in command) == here


def test_unknown_demo(checkout) -> None:
    with pytest.raises(
        CommandError,
        match='no demo for --family swin --task seg; families are vmamba, v2m, mamba2d, tasks are det, seg, cls',
    ):
        demo.run_demo('swin', 'seg')


def test_other_data_in_the_way(checkout) -> None:
    other = checkout / 'data' / 'shapes' / 'coco'
    other.mkdir(parents=True)
    (other / 'file').touch()
    with pytest.raises(CommandError, match='the data cannot be generated: .*was not made by this generator'):
        demo.run_demo()


@pytest.mark.parametrize('row', demo.DEMOS.values(), ids=['-'.join(key) for key in demo.DEMOS])
def test_each_demo_s_config_reads_what_is_generated(row) -> None:
    cfg = demo_run.load_config(ROOT / row.config)
    assert cfg.train_dataloader.dataset.data_root == f'data/shapes/{row.task.data_format}/'
    classes = SEG_CLASSES if row.task.data_format == 'ade20k' else CLASSES
    for mode in ('train', 'val', 'test'):
        assert tuple(cfg[f'{mode}_dataloader'].dataset.metainfo.classes) == classes


def test_every_family_has_every_task() -> None:
    assert set(demo.DEMOS) == {(family, task) for family in ('vmamba', 'v2m', 'mamba2d') for task in SHORT}
