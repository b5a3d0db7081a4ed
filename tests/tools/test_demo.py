"""The demo, on a tiny scale."""

import dataclasses
import json
import subprocess
import time
from pathlib import Path

import pytest

from ssm_backbones import demo
from ssm_backbones.datasets.options import ShapesOptions
from ssm_backbones.preflight import CommandError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def checkout(tmp_path, monkeypatch, write_config) -> Path:
    """A folder like a checkout's root, whose demo is tiny."""
    for name in ('tools', 'configs', 'ssm_backbones', 'cuda_ops'):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    config = write_config('mmdet', 'train_cfg = dict(max_epochs=4, val_interval=2)', data=Path('data/shapes'))
    tiny = dataclasses.replace(
        demo.DEMOS['vmamba', 'det'],
        config=str(config),
        options=ShapesOptions(seed=3, train=12, val=4, size=(64, 64)),
    )
    monkeypatch.setitem(demo.DEMOS, ('vmamba', 'det'), tiny)
    return tmp_path


def killed_after_the_first_epoch(command, check, **kwargs) -> subprocess.CompletedProcess:
    process = subprocess.Popen(command, **kwargs)
    work_dir = Path(command[command.index('--work-dir') + 1])
    while not (work_dir / 'last_checkpoint').exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    return subprocess.CompletedProcess(command, process.wait())


def test_demo_is_interrupted_carried_on_reported_and_renewed(checkout, monkeypatch, capfd, environment) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    out = checkout / 'demo' / 'vmamba-det'
    with monkeypatch.context() as patch, pytest.raises(CommandError, match='carries on from the last epoch'):
        patch.setattr(demo.subprocess, 'run', killed_after_the_first_epoch)
        demo.run_demo()
    assert not (out / 'results.json').exists()
    capfd.readouterr()

    figures = demo.run_demo()
    assert set(figures) == {'coco/bbox_mAP', 'coco/segm_mAP'}
    written = {path.name for path in out.iterdir() if not path.name.startswith('.')}
    assert written == {'train', 'predictions.png', 'curves.png', 'model.pth', 'results.json', 'fingerprint'}
    lines = capfd.readouterr().out.splitlines()
    assert any('resumed epoch: ' in line for line in lines)
    assert any('eta: ' in line for line in lines)
    assert lines[-1].startswith(
        f'box AP {figures["coco/bbox_mAP"]:.3f}, mask AP {figures["coco/segm_mAP"]:.3f} on held-out'
    )
    assert lines[-1].endswith('predictions.png, curves.png and model.pth in demo/vmamba-det/')

    checkpoint = (out / 'model.pth').stat()
    assert demo.run_demo() == figures
    assert 'Finished before' in capfd.readouterr().out
    assert (out / 'model.pth').stat() == checkpoint

    config = Path(demo.DEMOS['vmamba', 'det'].config)
    config.write_text(config.read_text().replace('max_epochs=4', 'max_epochs=1'))
    demo.run_demo()
    assert 'Starting anew: data or config have changed' in capfd.readouterr().out
    assert (out / 'train' / 'epoch_1.pth').is_file() and not (out / 'train' / 'epoch_4.pth').exists()


def test_unknown_demo(checkout) -> None:
    with pytest.raises(CommandError, match='no demo for --family v2m --task seg; there is: --family vmamba --task det'):
        demo.run_demo('v2m', 'seg')


def test_other_data_in_the_way(checkout) -> None:
    other = checkout / 'data' / 'shapes' / 'coco'
    other.mkdir(parents=True)
    (other / 'file').touch()
    with pytest.raises(CommandError, match='the data cannot be generated: .*was not made by this generator'):
        demo.run_demo()


@pytest.mark.parametrize('row', demo.DEMOS.values(), ids=['-'.join(key) for key in demo.DEMOS])
def test_each_demo_s_config_reads_what_is_generated(row) -> None:
    cfg = demo.load_config(ROOT / row.config)
    assert cfg.train_dataloader.dataset.data_root == f'data/shapes/{row.data_format}/'
    assert json.dumps(row.options.as_json())
