"""tools/convert_checkpoint.py, as users call it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.checkpoints.small import classifier, prefixed, pyramid

TOOL = Path(__file__).resolve().parents[2] / 'tools' / 'convert_checkpoint.py'


@pytest.fixture
def command(tool, tmp_path, monkeypatch):
    """The tool's main function, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tool.main


def load(path):
    return torch.load(path, weights_only=True)


def test_there_and_back(command, capsys):
    tensors = classifier()
    torch.save({'model': tensors, 'epoch': 3}, 'official.pth')
    assert command(['official.pth', 'ours.pth']) == 0
    out = capsys.readouterr().out
    assert "official.pth: classifier, VMamba, arch='test' (weights: model)" in out
    assert 'left out: epoch: no part of the weights' in out and 'written: ours.pth' in out
    assert 'head.fc.weight' in load('ours.pth')['state_dict']
    assert command(['ours.pth', 'back.pth', '--to-official']) == 0
    back = load('back.pth')
    assert list(back) == ['model'] and list(back['model']) == list(tensors)
    assert all(torch.equal(back['model'][name], tensor) for name, tensor in tensors.items())


def test_a_detectors_backbone_alone_for_images_of_four_channels(command):
    torch.save({'state_dict': {**prefixed('backbone.', pyramid()), 'neck.weight': torch.ones(1)}}, 'official.pth')
    assert command(['official.pth', 'ours.pth', '--backbone-only', '--in-channels', '4']) == 0
    state = load('ours.pth')['state_dict']
    assert state['patch_embed.first.conv.weight'].shape == (8, 4, 3, 3)
    assert 'norm0.weight' in state and 'neck.weight' not in state
    assert command(['ours.pth', 'back.pth', '--to-official']) == 0
    assert load('back.pth')['state_dict']['backbone.patch_embed.0.weight'].shape == (8, 4, 3, 3)


def test_moving_averages(command):
    raw, averaged = classifier(), classifier()
    torch.save({'model': raw, 'model_ema': averaged}, 'official.pth')
    assert command(['official.pth', 'ours.pth', '--weights', 'ema']) == 0
    assert torch.equal(load('ours.pth')['state_dict']['head.fc.weight'], averaged['classifier.head.weight'])
    assert command(['ours.pth', 'back.pth', '--to-official']) == 0
    assert list(load('back.pth')) == ['model_ema']


def test_an_existing_file_is_kept_unless_told_otherwise(command, capsys):
    torch.save({'model': classifier()}, 'official.pth')
    Path('ours.pth').write_text('mine')
    assert command(['official.pth', 'ours.pth']) == 2
    assert 'error: ours.pth exists' in capsys.readouterr().err
    assert Path('ours.pth').read_text() == 'mine'
    assert command(['official.pth', 'ours.pth', '--overwrite']) == 0
    assert 'state_dict' in load('ours.pth')


def test_options_that_contradict_each_other(command, capsys):
    with pytest.raises(SystemExit, match='2'):
        command(['ours.pth', 'back.pth', '--to-official', '--in-channels', '4'])
    assert '--to-official takes the file as it is' in capsys.readouterr().err


def test_errors_are_one_line_and_leave_no_file(tmp_path):
    (tmp_path / 'page.pth').write_text('<html>')
    run = subprocess.run(
        [sys.executable, TOOL, 'page.pth', 'ours.pth'],
        cwd=tmp_path,
        text=True,
        capture_output=True,
        env={**os.environ, 'PYTHONPATH': str(TOOL.parents[1])},
    )
    assert run.returncode == 2
    assert [line for line in run.stderr.splitlines() if line.startswith('error: ')] == [
        'error: page.pth is a web page, not a checkpoint: what was saved is the page that led to the file, or an error '
        'page. Download the file itself.'
    ]
    assert 'Traceback' not in run.stderr
    assert [entry.name for entry in tmp_path.iterdir()] == ['page.pth']
