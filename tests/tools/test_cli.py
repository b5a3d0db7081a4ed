"""The command lines: their arguments, and one clear line for what cannot be done."""

import importlib
import json
import shutil
from pathlib import Path

import pytest

from ssm_backbones import cli
from ssm_backbones.cli import test_main as run_test
from ssm_backbones.cli import train_main as run_train
from ssm_backbones.engine import runner


@pytest.fixture
def work_dir(tmp_path) -> Path:
    return tmp_path / 'work'


def fails(capsys, status: int) -> str:
    """The one line in which the command said what is wrong."""
    assert status == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith('error: ')]
    assert len(lines) == 1
    return lines[0]


def test_train_arguments(monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(runner, 'train', seen.append)
    arguments = (
        'c.py --work-dir w --resume --amp --auto-scale-lr --cfg-options a.b=1 c=[2,3] --launcher slurm --local-rank 3'
    )
    monkeypatch.delenv('LOCAL_RANK', raising=False)
    assert run_train(arguments.split()) == 0
    options = runner.TrainOptions('c.py', 'w', 'auto', True, True, {'a.b': 1, 'c': [2, 3]}, 'slurm')
    assert seen == [options]
    assert cli.os.environ['LOCAL_RANK'] == '3'
    assert run_train(['c.py']) == run_train(['c.py', '--resume', 'x.pth']) == 0
    assert [options.resume for options in seen[1:]] == [None, 'x.pth']


def test_test_arguments(monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(runner, 'test', seen.append)
    arguments = (
        'c.py x.pth --work-dir w --out o.pkl --show --show-dir s --wait-time 1 --tta --cfg-options a=b --launcher mpi'
    )
    assert run_test(arguments.split()) == 0
    assert seen == [runner.TestOptions('c.py', 'x.pth', 'w', 'o.pkl', True, 's', 1.0, True, {'a': 'b'}, 'mpi')]


def test_ctrl_c(monkeypatch, capsys) -> None:
    def interrupted(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, 'train', interrupted)
    assert run_train(['c.py']) == 130
    assert 'interrupted' in capsys.readouterr().err


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (None, 'does not exist'),
        ('model = dict(', 'cannot be read'),
        ("_base_ = 'mmdet::_base_/no_such_file.py'", 'no_such_file'),
        ('model = dict()', 'default_scope=None'),
        (
            "default_scope = 'mmrotate'\nmodel = dict()",
            "default_scope='mmrotate'; expected one of 'mmpretrain', 'mmdet', 'mmseg'",
        ),
        ("default_scope = 'mmdet'", 'has no `model`'),
    ],
    ids=['missing', 'broken', 'base missing', 'no scope', 'unknown scope', 'no model'],
)
def test_unusable_config(content, message, tmp_path, work_dir, capsys) -> None:
    config = tmp_path / 'config.py'
    if content is not None:
        config.write_text(content)
    error = fails(capsys, run_train([str(config), '--work-dir', str(work_dir)]))
    assert str(config) in error and message in error
    assert not work_dir.exists()


def test_host_library_missing(write_config, capsys, monkeypatch) -> None:
    config = write_config('mmseg')
    load = runner.importlib.import_module

    def without_mmseg(name, *args):
        if name == 'mmseg':
            raise ImportError('No module named mmseg')
        return load(name, *args)

    monkeypatch.setattr(runner.importlib, 'import_module', without_mmseg)
    assert 'pip install mmsegmentation' in fails(capsys, run_train([str(config)]))


@pytest.mark.parametrize(
    ('host', 'missing', 'key'),
    [
        ('mmdet', 'coco', 'train_dataloader.dataset.data_root'),
        ('mmdet', 'coco/annotations/instances_train2017.json', 'train_dataloader.dataset.ann_file'),
        ('mmdet', 'coco/val2017', 'val_dataloader.dataset.data_prefix.img'),
        ('mmseg', 'ade20k/annotations/training', 'train_dataloader.dataset.data_prefix.seg_map_path'),
        ('mmpretrain', 'imagenet', 'train_dataloader.dataset.data_root'),
    ],
)
def test_missing_data(host, missing, key, shapes, tmp_path, work_dir, write_config, capsys) -> None:
    data = tmp_path / 'data'
    shutil.copytree(shapes, data)
    gone = data / missing
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    error = fails(capsys, run_train([str(write_config(host, data=data)), '--work-dir', str(work_dir)]))
    assert error.startswith(f'error: {key}: {gone}') and 'does not exist' in error
    assert not work_dir.exists()


def test_missing_annotations_of_the_evaluator(shapes, work_dir, write_config, capsys) -> None:
    config = write_config('mmdet')
    options = ['--cfg-options', 'val_evaluator.ann_file=nowhere.json']
    error = fails(capsys, run_train([str(config), '--work-dir', str(work_dir), *options]))
    assert error.startswith('error: val_evaluator.ann_file: nowhere.json')


def test_missing_checkpoints(write_config, tmp_path, work_dir, capsys) -> None:
    config, nowhere = str(write_config('mmpretrain')), str(tmp_path / 'nowhere.pth')
    place = ['--work-dir', str(work_dir)]
    assert nowhere in fails(capsys, run_test([config, nowhere, *place]))
    assert nowhere in fails(capsys, run_train([config, *place, '--resume', nowhere]))
    init = ['--cfg-options', 'model.backbone.init_cfg.type=Pretrained', f'model.backbone.init_cfg.checkpoint={nowhere}']
    error = fails(capsys, run_train([config, *place, *init]))
    assert error.startswith('error: model.backbone.init_cfg.checkpoint') and nowhere in error
    assert not work_dir.exists()
    work_dir.mkdir()
    (work_dir / 'last_checkpoint').write_text(nowhere)
    assert nowhere in fails(capsys, run_train([config, *place, '--resume']))


def test_a_missing_module_that_may_be_the_user_s_is_named_with_its_place(capsys) -> None:
    assert cli.run_command(lambda: importlib.import_module('my_own_layers.mixers')) == 2
    error = capsys.readouterr().err
    assert error.startswith('error: this command needs my_own_layers') and error.count('\n') == 1
    assert 'test_cli.py:' in error and 'PYTHONPATH' in error and 'pip install' not in error
    with pytest.raises(ModuleNotFoundError, match='onnx.no_such_part'):
        cli.run_command(lambda: importlib.import_module('onnx.no_such_part'))


@pytest.mark.parametrize(
    ('content', 'worker'),
    [
        pytest.param(b'no image', False, id='broken', marks=pytest.mark.slow),
        pytest.param(b'', False, id='empty', marks=pytest.mark.slow),
        pytest.param(b'no image', True, id='broken, read by a worker'),
        pytest.param(None, False, id='missing', marks=pytest.mark.slow),
    ],
)
def test_unreadable_image(content, worker, shapes, tmp_path, work_dir, write_config, capsys) -> None:
    data = tmp_path / 'data'
    shutil.copytree(shapes, data)
    annotations = json.loads((data / 'coco/annotations/instances_train2017.json').read_text())
    for image in annotations['images']:
        image = data / 'coco/train2017' / image['file_name']
        image.unlink() if content is None else image.write_bytes(content)
    config = write_config('mmdet', f'train_dataloader = dict(num_workers={int(worker)})', data)
    error = fails(capsys, run_train([str(config), '--work-dir', str(work_dir), '--no-check']))
    assert error.startswith(f'error: image {data}/coco/train2017/') and 'cannot be read' in error
    assert not list(work_dir.glob('*.pth'))


def test_unreadable_label_map(shapes, tmp_path, work_dir, write_config, capsys) -> None:
    data = tmp_path / 'data'
    shutil.copytree(shapes, data)
    for path in (data / 'ade20k/annotations/training').iterdir():
        path.write_bytes(b'no image')
    arguments = [str(write_config('mmseg', data=data)), '--work-dir', str(work_dir), '--no-check']
    error = fails(capsys, run_train(arguments))
    assert error.startswith(f'error: label map {data}/ade20k/annotations/training/')


def test_options_that_a_config_does_not_allow(write_config, tmp_path, work_dir, capsys) -> None:
    place = ['--work-dir', str(work_dir)]
    config = str(write_config('mmpretrain', 'auto_scale_lr = dict(_delete_=True)'))
    assert 'base_batch_size' in fails(capsys, run_train([config, *place, '--auto-scale-lr']))
    config = str(write_config('mmpretrain', "optim_wrapper = dict(type='ApexOptimWrapper')"))
    assert "'ApexOptimWrapper'" in fails(capsys, run_train([config, *place, '--amp']))
    checkpoint = tmp_path / 'checkpoint.pth'
    checkpoint.touch()
    for host, out in (('mmdet', 'out.json'), ('mmpretrain', 'out'), ('mmseg', str(checkpoint))):
        error = fails(capsys, run_test([str(write_config(host)), str(checkpoint), *place, '--out', out]))
        assert error.startswith(f'error: --out {out}')
    config = str(write_config('mmseg', 'tta_model = None'))
    assert 'tta_model' in fails(capsys, run_test([config, str(checkpoint), *place, '--tta']))
    config = str(write_config('mmpretrain'))
    assert 'without --tta' in fails(capsys, run_test([config, str(checkpoint), *place, '--tta', '--show-dir', 'shown']))
    assert not work_dir.exists()


def test_launchers_that_need_gpus(write_config, work_dir, capsys, monkeypatch) -> None:
    monkeypatch.setattr('torch.cuda.is_available', lambda: False)
    arguments = [str(write_config('mmpretrain')), '--work-dir', str(work_dir), '--launcher', 'slurm']
    assert '--launcher slurm needs a GPU' in fails(capsys, run_train(arguments))
