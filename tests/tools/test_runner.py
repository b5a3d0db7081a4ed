"""Training and testing configs of the three host libraries."""

import logging
import math
import pickle
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

HOSTS = ('mmdet', 'mmseg', 'mmpretrain')
METRICS = {
    'mmdet': {'coco/bbox_mAP', 'coco/segm_mAP'},
    'mmseg': {'mIoU', 'aAcc'},
    'mmpretrain': {'accuracy/top1'},
}


@dataclass(frozen=True)
class Trained:
    host: str
    config: str
    work_dir: Path

    @property
    def checkpoint(self) -> str:
        return (self.work_dir / 'last_checkpoint').read_text()


@pytest.fixture(scope='module', params=HOSTS)
def trained(request, train, write_config, tmp_path_factory) -> Trained:
    """A short training of the host's tiny config."""
    host = request.param
    config, work_dir = str(write_config(host)), tmp_path_factory.mktemp(f'train_{host}')
    train(config, work_dir)
    return Trained(host, config, work_dir)


def test_the_loss_falls(trained, read_losses) -> None:
    losses = list(read_losses(trained.work_dir).values())
    assert len(losses) == 24
    assert np.mean(losses[-4:]) < 0.8 * np.mean(losses[:4])


def test_evaluates_dumps_and_draws(trained, test, tmp_path) -> None:
    out = tmp_path / ('maps' if trained.host == 'mmseg' else 'predictions.pkl')
    shown = tmp_path / 'shown'
    metrics = test(trained.config, trained.checkpoint, tmp_path / 'test', out=str(out), show_dir=str(shown))
    assert METRICS[trained.host] <= set(metrics)
    assert all(0 <= metrics[name] <= 100 for name in METRICS[trained.host])
    # mmdet keeps a picture's own name, the others write PNG.
    pictures = sorted(path for path in shown.rglob('*') if path.suffix in ('.png', '.jpg'))
    assert len(pictures) == 4
    assert np.asarray(Image.open(pictures[0])).std() > 0
    if trained.host == 'mmseg':
        maps = [np.asarray(Image.open(path)) for path in sorted(out.iterdir())]
        assert len(maps) == 4
        assert all(1 <= labels.min() <= labels.max() <= 7 for labels in maps)
        return
    predictions = pickle.loads(out.read_bytes())
    assert len(predictions) == 4
    if trained.host == 'mmdet':
        found = predictions[0]['pred_instances']
        assert len(found['masks']) == len(found['scores']) > 0
    else:
        assert predictions[0]['pred_score'].sum().item() == pytest.approx(1)


def test_tta(trained, test, tmp_path, caplog) -> None:
    with caplog.at_level(logging.WARNING, 'ssm_backbones.runner'):
        metrics = test(trained.config, trained.checkpoint, tmp_path / 'test', tta=True)
    if trained.host == 'mmdet':
        assert 'coco/bbox_mAP' in metrics and 'coco/segm_mAP' not in metrics
        assert 'merges boxes only' in caplog.text
    else:
        assert METRICS[trained.host] <= set(metrics)


@pytest.mark.parametrize('host', HOSTS)
def test_amp_computes_in_bfloat16_on_cpus(host, train, write_config, read_losses, tmp_path) -> None:
    if torch.cuda.is_available():
        pytest.skip('on a GPU --amp means float16')
    length = 'dict(max_iters=2)' if host == 'mmseg' else 'dict(max_epochs=1)'
    config = str(write_config(host, f'train_cfg = {length}'))
    runs = {}
    for amp in (False, True):
        runner = train(config, tmp_path / str(amp), amp=amp)
        runs[amp] = list(read_losses(tmp_path / str(amp)).values())
        assert runs[amp]
        assert all(parameter.dtype == torch.float32 for parameter in runner.model.parameters())
    assert all(math.isfinite(loss) for loss in runs[True])
    # The first loss comes from the same weights and pictures: rounding tells it apart, and no more than rounding.
    assert runs[True][0] != runs[False][0]
    assert runs[True][0] == pytest.approx(runs[False][0], rel=0.03)


@pytest.mark.skipif(torch.cuda.is_available(), reason='on a GPU AmpOptimWrapper stays')
def test_a_config_s_float16_becomes_bfloat16_on_cpus(train, write_config, tmp_path, caplog) -> None:
    changes = """
    train_cfg = dict(max_epochs=1)
    val_cfg = val_dataloader = val_evaluator = None
    optim_wrapper = dict(type='AmpOptimWrapper', loss_scale='dynamic')
    """
    runner = train(write_config('mmpretrain', changes), tmp_path)
    assert type(runner.optim_wrapper).__name__ == 'BFloat16OptimWrapper'
    assert 'AmpOptimWrapper needs a GPU' in caplog.text


def test_auto_scale_lr_follows_the_batch(train, write_config, tmp_path) -> None:
    changes = 'train_cfg = dict(max_epochs=1)\nval_cfg = val_dataloader = val_evaluator = None'
    config = str(write_config('mmpretrain', changes))
    runner = train(config, tmp_path, auto_scale_lr=True)
    assert runner.optim_wrapper.get_lr()['lr'] == [pytest.approx(4e-3 * 4 / 8)]


@pytest.mark.parametrize('resume', ['auto', 'path'])
def test_resuming_by_iteration_goes_on_as_if_nothing_had_happened(
    resume, train, write_config, read_losses, tmp_path
) -> None:
    short, full = (str(write_config('mmseg', f'train_cfg = dict(max_iters={end}, val_interval=99)')) for end in (8, 16))
    whole, parts = tmp_path / 'whole', tmp_path / 'parts'
    train(full, whole)
    train(short, parts)
    runner = train(full, parts, 'auto' if resume == 'auto' else parts / 'iter_8.pth')
    assert runner.iter == 16
    assert len(read_losses(whole)) == 16
    assert read_losses(parts) == pytest.approx(read_losses(whole), rel=1e-5)


def test_configs_need_not_import_the_package(train, write_config, tmp_path) -> None:
    config = write_config('mmpretrain', 'custom_imports = None\ntrain_cfg = dict(max_epochs=1)')
    assert train(config, tmp_path).epoch == 1


def test_the_work_dir_is_named_by_the_config(train, write_config, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = write_config('mmpretrain', 'train_cfg = dict(max_epochs=1)')
    train(config)
    assert (tmp_path / 'work_dirs' / config.stem / 'epoch_1.pth').is_file()
