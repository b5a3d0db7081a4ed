"""Training and testing configs of the three host libraries."""

import argparse
import functools
import importlib
import json
import logging
import math
import os
import pickle
import shutil
import textwrap
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from ssm_backbones.apis.config import load_config
from ssm_backbones.checkpoints import convert_file
from ssm_backbones.shapes.classes import SEG_PALETTE
from ssm_backbones.utils.errors import CommandError
from tests.checkpoints.small import classifier

ROOT = Path(__file__).resolve().parents[2]
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


SOURCES = {
    'mmdet': 'coco/val2017/*{}.jpg',
    'mmseg': 'ade20k/images/validation/*{}.jpg',
    'mmpretrain': 'imagenet/val/*/*{}.JPEG',
}


def read_image(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert('RGB')).astype(float)


def check_drawn(host: str, path: Path, shapes: Path, maps: Path) -> None:
    """Something is drawn on an image of the data set: the classes' names, or on the left half the truth.

    mmseg's right half is compared with the label map that was written.
    """
    number = path.name.partition('.')[0][-4:]
    (source,) = shapes.glob(SOURCES[host].format(number))
    image, drawn = read_image(source), read_image(path)
    parts = [drawn] if host == 'mmpretrain' else np.split(drawn, 2, axis=1)
    assert all(part.shape == image.shape for part in parts)
    changed = np.abs(parts[0] - image).max(axis=2)
    assert (changed > 60).mean() > 0.02
    if host != 'mmseg':
        assert all((np.abs(part - image).max(axis=2) < 25).mean() > 0.15 for part in parts)
        return
    labels = np.asarray(Image.open(next(maps.glob(f'*{number}.png')))) - 1
    colours = np.array(SEG_PALETTE, dtype=float)[labels]
    assert np.abs(parts[1] - colours).mean() < 0.6 * np.abs(image - colours).mean()


def test_evaluates_dumps_and_draws(trained, test, shapes, tmp_path) -> None:
    out = tmp_path / ('maps' if trained.host == 'mmseg' else 'predictions.pkl')
    shown = tmp_path / 'shown'
    metrics = test(trained.config, trained.checkpoint, tmp_path / 'test', out=str(out), show_dir=str(shown))
    assert METRICS[trained.host] <= set(metrics)
    assert all(0 <= metrics[name] <= 100 for name in METRICS[trained.host])
    # mmdet keeps an image's own name, the others write PNG.
    images = sorted(path for path in shown.rglob('*') if path.suffix in ('.png', '.jpg'))
    assert len(images) == 4
    for path in images:
        check_drawn(trained.host, path, shapes, out)
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
    with caplog.at_level(logging.WARNING, 'ssm_backbones.engine.runner'):
        metrics = test(trained.config, trained.checkpoint, tmp_path / 'test', tta=True)
    if trained.host == 'mmdet':
        assert 'coco/bbox_mAP' in metrics and 'coco/segm_mAP' not in metrics
        assert 'merges boxes only' in caplog.text
    else:
        assert METRICS[trained.host] <= set(metrics)


# A detector has the most parts that see lower precision.
@pytest.mark.parametrize(
    'host', [pytest.param(host, marks=() if host == 'mmdet' else pytest.mark.slow) for host in HOSTS]
)
def test_amp_computes_in_bfloat16_on_cpus(host, train, write_config, tmp_path) -> None:
    if torch.cuda.is_available():
        pytest.skip('on a GPU --amp means float16')
    length = 'dict(max_iters=2)' if host == 'mmseg' else 'dict(max_epochs=1)'
    config = str(write_config(host, f'train_cfg = {length}'))
    runs = {}
    for amp in (False, True):
        runner = train(config, tmp_path / str(amp), amp=amp)
        # A detector's later losses are of proposals, which rounding may choose differently.
        name = 'loss_rpn_cls' if host == 'mmdet' else 'loss'
        (log,) = (tmp_path / str(amp)).glob('*/vis_data/scalars.json')
        runs[amp] = [record[name] for record in map(json.loads, log.read_text().splitlines()) if name in record]
        assert runs[amp]
        assert all(parameter.dtype == torch.float32 for parameter in runner.model.parameters())
    assert all(math.isfinite(loss) for loss in runs[True])
    # The first loss comes from the same weights and images: rounding tells it apart, and no more than rounding.
    assert runs[True][0] != runs[False][0]
    assert runs[True][0] == pytest.approx(runs[False][0], rel=0.03)


@pytest.mark.skipif(torch.cuda.is_available(), reason='on a GPU AmpOptimWrapper stays')
@pytest.mark.parametrize(('instructions', 'slow'), [([], True), (['avx512_bf16'], False)])
def test_a_config_s_float16_becomes_bfloat16_on_cpus(
    instructions, slow, train, write_config, tmp_path, caplog, monkeypatch
) -> None:
    monkeypatch.setattr('ssm_backbones.engine.runner.cpuinfo', lambda: 'known')
    monkeypatch.setattr('ssm_backbones.engine.runner.bfloat16_instructions', lambda: instructions)
    changes = """
    train_cfg = dict(max_epochs=1)
    val_cfg = val_dataloader = val_evaluator = None
    optim_wrapper = dict(type='AmpOptimWrapper', loss_scale='dynamic')
    """
    runner = train(write_config('mmpretrain', changes), tmp_path)
    assert type(runner.optim_wrapper).__name__ == 'BFloat16OptimWrapper'
    assert 'AmpOptimWrapper needs a GPU' in caplog.text
    assert ('this processor has no instructions for it' in caplog.text) == slow


def test_auto_scale_lr_follows_the_batch(train, write_config, tmp_path) -> None:
    changes = 'train_cfg = dict(max_epochs=1)\nval_cfg = val_dataloader = val_evaluator = None'
    config = str(write_config('mmpretrain', changes))
    runner = train(config, tmp_path, auto_scale_lr=True)
    assert runner.optim_wrapper.get_lr()['lr'] == [pytest.approx(4e-3 * 4 / 8)]


@pytest.mark.parametrize('resume', ['auto', pytest.param('path', marks=pytest.mark.slow)])
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


@pytest.fixture
def started(monkeypatch) -> list[tuple]:
    """What would be built and trained, in place of doing so: (resume, load_from, lines for the log)."""
    seen = []

    class Built:
        def __init__(self, cfg) -> None:
            self.lines: list[str] = []
            self.logger = SimpleNamespace(info=self.lines.append)
            self.hooks: list = []
            self.model = torch.nn.Identity()
            seen.append((cfg.resume, cfg.load_from, self.lines))

        def register_hook(self, hook) -> None:
            """Nothing is loaded."""

        def train(self) -> None:
            """Nothing is trained."""

    monkeypatch.setattr('ssm_backbones.engine.runner._build_runner', Built)
    return seen


def test_resume_without_anything_to_resume_starts_as_the_config_says(started, train, write_config, tmp_path) -> None:
    source, work_dir = tmp_path / 'start.pth', tmp_path / 'work'
    torch.save(dict(state_dict={}), source)
    with_start, without = (write_config('mmpretrain', line) for line in (f'load_from = {str(source)!r}', ''))
    train(with_start, work_dir, resume='auto')
    train(without, work_dir, resume='auto')
    train(write_config('mmpretrain', 'resume = True'), work_dir)
    assert [run[:2] for run in started] == [(False, str(source)), (False, None), (False, None)]
    assert all('last_checkpoint to resume from' in run[2][0] for run in started)
    assert f'load_from={str(source)!r}' in started[0][2][0]
    # Once there is something, the config's own start no longer counts.
    latest = work_dir / 'epoch_1.pth'
    torch.save(dict(state_dict={}), latest)
    (work_dir / 'last_checkpoint').write_text(str(latest))
    train(with_start, work_dir, resume='auto')
    assert started[-1] == (True, str(latest), [])
    # mmengine's own way to name what to go on from.
    train(write_config('mmpretrain', f'resume = True\nload_from = {str(source)!r}'), work_dir)
    assert started[-1] == (True, str(source), [])


def test_a_moved_work_dir_is_resumed_from_its_own_file(started, train, write_config, tmp_path, monkeypatch) -> None:
    config, work_dir = write_config('mmpretrain'), tmp_path / 'moved'
    work_dir.mkdir()
    torch.save(dict(state_dict={}), work_dir / 'epoch_1.pth')
    for named in (str(tmp_path / 'old' / 'epoch_1.pth'), 'work_dirs/old/epoch_1.pth'):
        (work_dir / 'last_checkpoint').write_text(named)
        train(config, work_dir, resume='auto')
        resumed, checkpoint, (line,) = started.pop()
        assert (resumed, checkpoint) == (True, str(work_dir / 'epoch_1.pth'))
        assert named in line and str(work_dir / 'epoch_1.pth') in line
    # A checkpoint that is kept elsewhere, as CheckpointHook's out_dir has it, is taken from there.
    elsewhere = tmp_path / 'elsewhere' / 'epoch_2.pth'
    elsewhere.parent.mkdir()
    torch.save(dict(state_dict={}), elsewhere)
    (work_dir / 'last_checkpoint').write_text(str(elsewhere))
    train(config, work_dir, resume='auto')
    assert started.pop() == (True, str(elsewhere), [])


@pytest.mark.parametrize('record', [None, ''])
def test_checkpoints_whose_record_a_kill_prevented_are_resumed_from(
    record, started, train, write_config, tmp_path
) -> None:
    torch.save(dict(state_dict={}), tmp_path / 'start.pth')
    train(write_config('mmpretrain'), tmp_path, resume='auto')
    assert started.pop()[:2] == (False, None)
    for name in ('iter_20.pth', 'iter_10.pth'):
        torch.save(dict(state_dict={}), tmp_path / name)
    os.utime(tmp_path / 'iter_10.pth', (0, 0))
    if record is not None:
        (tmp_path / 'last_checkpoint').write_text(record)
    train(write_config('mmpretrain'), tmp_path, resume='auto')
    resumed, checkpoint, (line,) = started.pop()
    assert (resumed, checkpoint) == (True, str(tmp_path / 'iter_20.pth')) and checkpoint in line


def test_a_record_without_its_file_names_the_way_on(started, train, write_config, tmp_path) -> None:
    record = tmp_path / 'last_checkpoint'
    record.write_text('/old/epoch_2.pth')
    for name in ('epoch_1.pth', 'epoch_0.pth'):
        torch.save(dict(state_dict={}), tmp_path / name)
    os.utime(tmp_path / 'epoch_0.pth', (0, 0))
    with pytest.raises(CommandError) as failure:
        train(write_config('mmpretrain'), tmp_path, resume='auto')
    message = str(failure.value)
    assert message.startswith(f'{record} names /old/epoch_2.pth')
    assert f'--resume PATH, the latest one there is {tmp_path / "epoch_1.pth"}' in message
    assert 'load_from' not in message and not started
    with pytest.raises(CommandError, match=r'^--resume: checkpoint /gone\.pth does not exist'):
        train(write_config('mmpretrain'), tmp_path, resume='/gone.pth')


def test_configs_need_not_import_the_package(train, write_config, tmp_path) -> None:
    config = write_config('mmpretrain', 'custom_imports = None\ntrain_cfg = dict(max_epochs=1)')
    assert train(config, tmp_path).epoch == 1


def test_the_work_dir_is_named_by_the_config(train, write_config, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = write_config('mmpretrain', 'train_cfg = dict(max_epochs=1)')
    train(config)
    assert (tmp_path / 'work_dirs' / config.stem / 'epoch_1.pth').is_file()


def predictions(test, config: Path, checkpoint: object, folder: Path) -> list[np.ndarray]:
    test(config, checkpoint, folder, out=str(folder / 'predictions.pkl'))
    return [found['pred_score'].numpy() for found in pickle.loads((folder / 'predictions.pkl').read_bytes())]


@pytest.fixture
def official(tmp_path) -> Path:
    """A classifier as the authors' trainer saves it."""
    path = tmp_path / 'vssm_test.pth'
    torch.save(dict(model=classifier(num_classes=6), config=argparse.Namespace(drop=0.2), epoch=3), path)
    return path


@pytest.fixture
def served(tmp_path, monkeypatch) -> Iterator[str]:
    """The address of the test's folder."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'downloads'))
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f'http://127.0.0.1:{server.server_port}'
        server.shutdown()


def test_the_authors_files_are_tested_as_they_are(official, served, test, write_config, tmp_path) -> None:
    config = write_config('mmpretrain')
    convert_file(official, tmp_path / 'converted.pth')
    expected = predictions(test, config, tmp_path / 'converted.pth', tmp_path / 'a')
    for name, source in (('b', official), ('c', f'{served}/{official.name}')):
        np.testing.assert_array_equal(predictions(test, config, source, tmp_path / name), expected)
    other = write_config('mmpretrain', 'model = dict(head=dict(num_classes=7))')
    with pytest.raises(CommandError, match=r'vssm_test\.pth does not fit the model .*head\.fc\.weight is \(6, 128\)'):
        test(other, official, tmp_path / 'd', check=False)


def test_a_training_starts_from_a_backbone_that_fits(official, served, train, write_config, tmp_path) -> None:
    """The head's classes may differ; the authors' files and addresses serve too."""
    still = """
    train_cfg = dict(max_epochs=1)
    val_cfg = val_dataloader = val_evaluator = None
    optim_wrapper = dict(optimizer=dict(lr=0.0))
    """
    source = torch.load(official, weights_only=False)['model']
    for number, name in enumerate((str(official), f'{served}/{official.name}')):
        changes = f'{still}\n    model = dict(head=dict(num_classes=7))\n    load_from = {name!r}'
        config = write_config('mmpretrain', changes)
        runner = train(config, tmp_path / str(number), check=False)
        taken = runner.model.backbone.stages[0].blocks[0].mixer.out_proj.weight
        torch.testing.assert_close(taken.detach(), source['layers.0.blocks.0.op.out_proj.weight'])
    config = write_config(
        'mmpretrain',
        f"{still}\n    model = dict(backbone=dict(arch='test', in_channels=4))\n    load_from = {str(official)!r}",
    )
    with pytest.raises(CommandError, match=r'does not fit the backbone .*first\.conv\.weight is \(8, 3, 3, 3\)'):
        train(config, tmp_path / 'wrong', check=False)


def test_no_checkpoint_passes_for_another(train, test, write_config, tmp_path) -> None:
    config, path = write_config('mmpretrain'), tmp_path / 'odd.pth'
    torch.save(dict(state_dict={}), path)
    with pytest.raises(CommandError, match=r'odd\.pth does not fit the model of the config: backbone\..* is missing'):
        test(config, path, tmp_path / 'a')
    path.write_text('<html>')
    with pytest.raises(CommandError, match='is a web page'):
        test(config, path, tmp_path / 'b')
    for options in (dict(), dict(resume=str(path))):
        with pytest.raises(CommandError, match='is a web page'):
            train(write_config('mmpretrain', f'load_from = {str(path)!r}'), tmp_path / 'c', **options)
    assert not {'b', 'c'} & {entry.name for entry in tmp_path.iterdir()}


def test_averaged_weights_are_tested_with_and_without_the_others(train, test, write_config, tmp_path) -> None:
    config = write_config(
        'mmpretrain',
        """
    train_cfg = dict(max_epochs=2)
    val_cfg = val_dataloader = val_evaluator = None
    custom_hooks = [dict(type='EMAHook', momentum=0.1, priority='ABOVE_NORMAL')]
    default_hooks = dict(checkpoint=dict(interval=1))
    test_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False)
    """,
    )
    train(config, tmp_path / 'train')
    whole = torch.load(tmp_path / 'train' / 'epoch_2.pth', weights_only=False)
    assert 'ema_state_dict' in whole
    torch.save(dict(state_dict=whole['state_dict']), tmp_path / 'alone.pth')
    torch.save(whole['state_dict'], tmp_path / 'bare.pth')
    expected = predictions(test, config, tmp_path / 'train' / 'epoch_2.pth', tmp_path / 'a')
    for name in ('alone', 'bare'):
        np.testing.assert_array_equal(predictions(test, config, tmp_path / f'{name}.pth', tmp_path / name), expected)
    assert train(config, tmp_path / 'train', resume='auto').epoch == 2


def test_the_loops_may_evaluate_in_half_precision(train, test, write_config, tmp_path) -> None:
    """On a CPU, ``fp16`` means bfloat16, which mmcv's operators do not take."""
    changes = """
        train_cfg = dict(max_epochs=1, val_interval=1)
        val_cfg = dict(fp16=True)
        test_cfg = dict(fp16=True)
        model = dict(test_cfg=dict(rcnn=dict(nms=dict(_delete_=True, type='soft_nms', iou_threshold=0.5))))
    """
    config = write_config('mmdet', changes)
    train(config, tmp_path)
    assert METRICS['mmdet'] <= test(config, tmp_path / 'epoch_1.pth', tmp_path / 'test').keys()


def test_a_config_s_own_imports_may_replace_ours(write_config, monkeypatch) -> None:
    """Mamba2D's classifiers need a head, which the configs import that they inherit from."""
    imported = []
    load = importlib.import_module

    def recorded(name, *args):
        imported.append(name)
        return load(name, *args)

    monkeypatch.setattr(importlib, 'import_module', recorded)
    load_config(write_config('mmpretrain', "custom_imports = dict(imports=['json'], allow_failed_imports=False)"))
    assert 'ssm_backbones.heads' in imported


def test_data_that_would_stop_the_training_later_are_refused_at_once(shapes, train, write_config, tmp_path) -> None:
    data = tmp_path / 'data'
    shutil.copytree(shapes, data)
    path = data / 'coco/annotations/instances_val2017.json'
    content = json.loads(path.read_text())
    for annotation in content['annotations']:
        del annotation['iscrowd']
    path.write_text(json.dumps(content))
    config = write_config('mmdet', 'train_cfg = dict(max_epochs=1, val_interval=1)', data)
    with pytest.raises(CommandError, match="no 'iscrowd', which val_evaluator needs") as failure:
        train(config, tmp_path / 'work')
    assert '--no-check' in str(failure.value) and not (tmp_path / 'work').exists()
    with pytest.raises(KeyError, match='iscrowd'):
        train(config, tmp_path / 'work', check=False)


@pytest.mark.slow
def test_a_compiled_training_is_the_same(train, test, write_config, read_losses, tmp_path) -> None:
    short = 'val_cfg = val_dataloader = val_evaluator = None\ntrain_cfg = dict(max_epochs={})'
    plain, compiled = (write_config('mmpretrain', f'{short.format(2)}\ncompile = {flag}') for flag in (False, True))
    first = write_config('mmpretrain', f'{short.format(1)}\ncompile = True')
    train(plain, tmp_path / 'plain')
    train(first, tmp_path / 'compiled')
    train(compiled, tmp_path / 'compiled', resume='auto')
    assert read_losses(tmp_path / 'compiled') == pytest.approx(read_losses(tmp_path / 'plain'), rel=1e-3)
    names = [torch.load(tmp_path / name / 'epoch_2.pth')['state_dict'].keys() for name in ('plain', 'compiled')]
    assert names[0] == names[1]
    assert test(plain, tmp_path / 'compiled/epoch_2.pth', tmp_path / 'test')


DEFORMABLE = {
    'VFNet': """
        vfnet = Config._get_cfg_path('mmdet::vfnet/vfnet_r50_fpn_1x_coco.py', '')[0]
        model = dict(_delete_=True, **Config.fromfile(vfnet).model.to_dict())
        model['backbone'] = dict(type='VMamba', arch='test', out_indices=(1, 2, 3))
        model['neck'].update(in_channels=[32, 64, 128], out_channels=32, start_level=0)
        model['bbox_head'].update(num_classes=6, in_channels=32, feat_channels=32, stacked_convs=1)
        del vfnet
    """,
    'DINO': """
        dino = '{root}/configs/vmamba/dino-4scale_vmamba-tiny_8xb2-12e_coco.py'
        model = dict(_delete_=True, **Config.fromfile(dino).model.to_dict())
        model['backbone'] = dict(type='VMamba', arch='test', out_indices=(1, 2, 3))
        model['neck'].update(in_channels=[32, 64, 128])
        model['num_queries'] = model['test_cfg']['max_per_img'] = 20
        model['encoder']['num_layers'] = model['decoder']['num_layers'] = 2
        model['bbox_head'].update(num_classes=6)
        del dino
    """,
}


@pytest.mark.slow
@pytest.mark.parametrize('detector', DEFORMABLE)
def test_detectors_of_deformable_operators_train_in_bfloat16(detector, train, write_config, tmp_path) -> None:
    changes = textwrap.dedent(DEFORMABLE[detector].replace('{root}', str(ROOT))) + textwrap.dedent("""
        val_evaluator = dict(metric=['bbox'])
        train_cfg = dict(max_epochs=1, val_interval=1)
        val_cfg = dict(fp16=True)
        del Config
    """)
    config = write_config('mmdet', f'from mmengine.config import Config\n{changes}')
    assert train(config, tmp_path, amp=True).epoch == 1
