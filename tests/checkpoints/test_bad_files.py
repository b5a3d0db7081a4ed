"""Files that are no official checkpoint, or not a whole one: one clear message, and nothing is loaded or written."""

import argparse
import gzip
import os
import pickle
import sys
import types
import zipfile

import numpy as np
import pytest
import torch

from ssm_backbones import VMamba, load_official
from ssm_backbones.checkpoints import (
    CheckpointError,
    convert_checkpoint,
    convert_file,
    read_checkpoint,
    restore_checkpoint,
    write_checkpoint,
)
from ssm_backbones.utils.torch_compat import release
from tests.checkpoints.layouts import mamba2d_classifier, random_tensors
from tests.checkpoints.small import classifier, prefixed, pyramid


class Code:
    """What a malicious pickle looks like."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def zipped(folder):
    path = folder / 'good.pth'
    torch.save({'model': classifier()}, path)
    return path.read_bytes()


def legacy(folder):
    path = folder / 'good.pth'
    torch.save({'model': classifier()}, path, _use_new_zipfile_serialization=False)
    return path.read_bytes()


def flipped(content):
    changed = bytearray(content)
    changed[len(changed) // 2] ^= 0xFF
    return bytes(changed)


def of_unknown_compression(content):
    changed = bytearray(content)
    changed[content.rindex(b'PK\x01\x02') + 10] = 0x63
    return bytes(changed)


def other_archive(folder):
    path = folder / 'other.zip'
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('readme.txt', 'hello')
    return path.read_bytes()


def scripted(folder):
    path = folder / 'scripted.pth'
    torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)).save(path)
    return path.read_bytes()


BAD_FILES = {
    'empty': (lambda _: b'', 'is empty'),
    'truncated': (lambda folder: zipped(folder)[:-1000], r'is truncated, damaged or no .* checkpoint \(\d+ bytes\)'),
    'cut in half': (lambda folder: zipped(folder)[:60000], 'is truncated, damaged'),
    'legacy, truncated': (lambda folder: legacy(folder)[:-1000], 'is truncated, damaged'),
    'legacy, cut at once': (lambda folder: legacy(folder)[:100], 'is truncated, damaged'),
    'one byte changed': (lambda folder: flipped(zipped(folder)), 'is damaged: the checksum of good/data/.* is wrong'),
    'compression': (lambda folder: of_unknown_compression(zipped(folder)), 'is damaged: .*compression'),
    'page': (lambda _: b'\n <!DOCTYPE html><html><body>Not found</body></html>', 'is a web page, not a checkpoint'),
    'old page': (lambda _: b'<HTML><HEAD>', 'is a web page'),
    'page with a comment': (lambda _: b'<!-- 404 -->\n<html>', 'is a web page'),
    "a store's answer": (lambda _: b'<Error><Code>NoSuchKey</Code></Error>', 'is a web page'),
    "a server's answer": (
        lambda _: b'{"message": "Not Found"}',
        'is neither a PyTorch checkpoint nor a safetensors file: it starts with .*message',
    ),
    'safetensors, cut': (lambda _: (200).to_bytes(8, 'little') + b'{"a": ', 'is truncated or damaged'),
    'safetensors': (lambda _: (2).to_bytes(8, 'little') + b'{}', 'holds no tensors'),
    'compressed': (lambda folder: gzip.compress(zipped(folder)), 'is neither a PyTorch checkpoint nor'),
    'LFS pointer': (lambda _: b'version https://git-lfs.github.com/spec/v1\noid sha256:0', 'pointer of a Git LFS file'),
    'text': (lambda _: b'hello', "is neither a PyTorch checkpoint nor a safetensors file: it starts with b'hello'"),
    'array': (lambda _: b'\x93NUMPY' + bytes(100), 'is neither a PyTorch checkpoint nor'),
    'archive': (other_archive, 'is truncated, damaged or no PyTorch checkpoint'),
    'program': (scripted, 'TorchScript'),
    'a list': (lambda _: pickle.dumps([1, 2], protocol=2), 'is truncated, damaged or no PyTorch checkpoint'),
}


@pytest.mark.parametrize('case', BAD_FILES)
def test_what_is_no_checkpoint_is_refused(case, tmp_path):
    make, message = BAD_FILES[case]
    source, destination = tmp_path / 'source.pth', tmp_path / 'destination.pth'
    source.write_bytes(make(tmp_path))
    with pytest.raises(CheckpointError, match=message) as error:
        convert_file(source, destination)
    assert str(source) in str(error.value) and '\n' not in str(error.value)
    assert not destination.exists() and not list(tmp_path.glob('.*'))


@pytest.mark.parametrize('form', ['zip', 'legacy', 'pickle', 'new pickle'])
def test_code_is_refused_with_its_name_and_not_run(form, tmp_path):
    source, trap = tmp_path / 'source.pth', tmp_path / 'trap'
    checkpoint = {'model': classifier(), 'config': Code(str(trap))}
    if 'pickle' in form:
        source.write_bytes(pickle.dumps({'config': Code(str(trap))}, protocol=2 if form == 'pickle' else 4))
    else:
        torch.save(checkpoint, source, _use_new_zipfile_serialization=form == 'zip')
    model = VMamba('test')
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match='is refused: reading it would run or build posix.mkdir'):
        load_official(model, source)
    assert not trap.exists()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_missing_files_and_folders_are_named(tmp_path):
    with pytest.raises(CheckpointError, match='nowhere.pth does not exist'):
        read_checkpoint(tmp_path / 'nowhere.pth')
    with pytest.raises(CheckpointError, match='is not a file'):
        read_checkpoint(tmp_path)


def test_a_checkpoint_that_is_no_dictionary_is_refused(tmp_path):
    torch.save([torch.ones(1)], tmp_path / 'list.pth')
    with pytest.raises(CheckpointError, match='holds a list, not a dictionary'):
        read_checkpoint(tmp_path / 'list.pth')


@pytest.fixture
def trainers_file(tmp_path, monkeypatch):
    """A checkpoint with what Swin's trainer, from which the authors' descends, keeps beside the weights."""
    module = types.ModuleType('yacs.config')
    module.CfgNode = type('CfgNode', (dict,), {'__module__': 'yacs.config'})
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, 'yacs', types.ModuleType('yacs'))
        patch.setitem(sys.modules, 'yacs.config', module)
        node = module.CfgNode(MODEL=module.CfgNode(NAME='vssm'), EPOCHS=300)
        node.frozen = True
        path = tmp_path / 'swin.pth'
        torch.save({'model': classifier(), 'config': node, 'args': argparse.Namespace(lr=0.1)}, path)
    return path


def test_trainers_settings_are_read_without_their_libraries(trainers_file):
    checkpoint = read_checkpoint(trainers_file)
    assert checkpoint['config'] == {'MODEL': {'NAME': 'vssm'}, 'EPOCHS': 300} and checkpoint['args'].lr == 0.1
    assert convert_checkpoint(checkpoint)[1].left_out == {'config, args': 'no part of the weights'}


@pytest.mark.skipif(release() < (2, 6), reason='torch allows it beside other code from 2.6 on')
def test_a_reading_takes_no_permission_away_from_another(trainers_file):
    """As when a runner's checkpoint is read while an init_cfg reads the authors', each with settings in it."""
    read_checkpoint(trainers_file)
    with torch.serialization.safe_globals([argparse.Namespace]):
        read_checkpoint(trainers_file)
    assert torch.load(trainers_file, weights_only=True)['args'].lr == 0.1


@pytest.mark.parametrize('error', [AttributeError, TypeError, MemoryError])
def test_a_fault_of_a_program_is_not_blamed_on_an_intact_file(error, tmp_path, monkeypatch):
    def fail(*args, **options):
        raise error('no such thing')

    for zipped in (True, False):
        torch.save({'model': classifier()}, tmp_path / f'{zipped}.pth', _use_new_zipfile_serialization=zipped)
    monkeypatch.setattr(torch, 'load', fail)
    with pytest.raises(error, match='no such thing'):
        read_checkpoint(tmp_path / 'True.pth')
    # Files of the old format have no checksums.
    with pytest.raises(CheckpointError, match='is truncated, damaged or no PyTorch checkpoint'):
        read_checkpoint(tmp_path / 'False.pth')


def without(tensors, *names):
    return {name: tensor for name, tensor in tensors.items() if name not in names}


BAD_TENSORS = {
    'missing': (lambda t: without(t, 'layers.2.blocks.1.op.Ds'), r'.test.: layers.2.blocks.1.op.Ds \(256\) is missing'),
    'extra': (lambda t: {**t, 'layers.0.gate': torch.ones(1)}, 'layers.0.gate is not expected'),
    'shape': (lambda t: {**t, 'patch_embed.2.bias': torch.ones(9)}, r'patch_embed.2.bias is \(9\), expected \(8\)'),
    'integers': (lambda t: {**t, 'patch_embed.2.bias': torch.ones(8).int()}, 'patch_embed.2.bias is of torch.int32'),
    'no tensor': (lambda t: {**t, 'patch_embed.2.bias': [1.0] * 8}, 'patch_embed.2.bias is a list, expected a tensor'),
    'head': (lambda t: without(t, 'classifier.head.bias'), r'classifier.head.bias \(10\) is missing'),
    'norm': (lambda t: without(t, 'classifier.norm.weight', 'classifier.norm.bias'), 'classifier.norm.weight .* miss'),
    'decisive': (lambda t: without(t, 'layers.0.blocks.0.op.A_logs'), 'lacks layers.0.blocks.0.op.A_logs, which tells'),
    'stem': (lambda t: without(t, 'patch_embed.0.weight'), r'patch_embed.0.weight \(8, 1, 3, 3\) is missing'),
    'stage': (lambda t: {k: v for k, v in t.items() if not k.startswith('layers.1.')}, 'none that can be built'),
    'two names': (lambda t: {**t, 'outnorm3.weight': torch.ones(128)}, 'classifier.norm.weight is not expected'),
    'scalar': (lambda t: {**t, 'layers.0.blocks.0.norm.weight': torch.ones(())}, 'none that can be built'),
}


@pytest.mark.parametrize('case', BAD_TENSORS)
def test_incomplete_and_changed_checkpoints_are_refused(case, tmp_path):
    change, message = BAD_TENSORS[case]
    torch.save({'model': change(classifier())}, tmp_path / 'changed.pth')
    with pytest.raises(CheckpointError, match=message) as error:
        convert_file(tmp_path / 'changed.pth', tmp_path / 'ours.pth')
    assert 'changed.pth' in str(error.value)
    assert not (tmp_path / 'ours.pth').exists()


def test_detectors_are_strict_about_their_backbone():
    whole = {**prefixed('backbone.', pyramid()), 'neck.weight': torch.ones(1)}
    with pytest.raises(CheckpointError, match='backbone.classifier.head.weight is not expected'):
        convert_checkpoint({'state_dict': {**whole, 'backbone.classifier.head.weight': torch.ones(10, 128)}})
    with pytest.raises(CheckpointError, match=r'backbone.outnorm2.bias \(64\) is missing'):
        convert_checkpoint({'state_dict': without(whole, 'backbone.outnorm2.bias')})
    bare = {name: tensor for name, tensor in whole.items() if 'outnorm' not in name}
    with pytest.raises(CheckpointError, match='has no output norms .* would compute something else'):
        convert_checkpoint({'state_dict': bare})


def test_mamba2d_is_strict_too():
    tensors = random_tensors(mamba2d_classifier(embed_dims=[16, 24, 32, 64], depths=[2, 2, 1, 1], num_classes=10))
    for name, message in [
        ('backbone.stages.1.2.weight', 'lacks backbone.stages.1.2.weight'),
        ('backbone.stages.1.2.bias', r'backbone.stages.1.2.bias \(24\) is missing'),
        ('head.fc2.weight', r'head.fc2.weight \(10, 256\) is missing'),
        ('norm.weight', r'norm.weight \(64\) is missing'),
        ('backbone.ds.stem.conv.weight', 'stem.conv.weight .* is missing'),
    ]:
        with pytest.raises(CheckpointError, match=message):
            convert_checkpoint({'state_dict': without(tensors, name)})
    with pytest.raises(CheckpointError, match='neck.weight is not expected'):
        convert_checkpoint({'state_dict': {**tensors, 'neck.weight': torch.ones(1)}})
    nested = {name if name.startswith('norm') else f'backbone.{name}': tensor for name, tensor in tensors.items()}
    with pytest.raises(CheckpointError, match='backbone.head.fc1.weight is not expected'):
        convert_checkpoint({'state_dict': nested})


@pytest.mark.parametrize(
    ('checkpoint', 'message'),
    [
        ({}, 'x.pth holds no tensors by name, but nothing'),
        ({'epoch': 3, 'model': {'a': {'b': 1}}}, "holds no tensors by name, but 'epoch', 'model'"),
        (
            {'state_dict': {'conv1.weight': torch.ones(1), 'fc.bias': torch.ones(1)}},
            'no tensor has the name of one of their blocks. '
            'Its 2 tensors in state_dict begin with conv1.weight, fc.bias',
        ),
    ],
)
def test_foreign_checkpoints_are_refused(checkpoint, message):
    with pytest.raises(CheckpointError, match=message):
        convert_checkpoint(checkpoint, source='x.pth')


def test_our_own_checkpoints_are_not_converted_twice():
    converted, _ = convert_checkpoint({'model': classifier()})
    with pytest.raises(
        CheckpointError,
        match="has this package's own names already: load it with init_cfg=dict.*"
        r"checkpoint=\.\.\., prefix='backbone\.'\) or load_from",
    ):
        convert_checkpoint(converted)
    bare = convert_checkpoint({'model': classifier()}, backbone_only=True)[0]
    with pytest.raises(CheckpointError, match=r'already: .*checkpoint=\.\.\.\) or load_from'):
        convert_checkpoint(bare)
    with pytest.raises(CheckpointError, match='is no checkpoint of ours'):
        restore_checkpoint({'model': classifier()})


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda t: without(t, 'backbone.stages.2.blocks.1.mixer.D'), r'stages.2.blocks.1.mixer.D \(4, 64\) is missing'),
        (lambda t: {**t, 'backbone.extra': torch.ones(1)}, 'extra is not expected'),
        (lambda t: without(t, 'head.fc.bias'), 'head.fc.bias .* is missing'),
        (
            lambda t: without(t, 'backbone.stages.0.blocks.0.norm1.weight'),
            'lacks backbone.stages.0.blocks.0.norm1.weight',
        ),
    ],
)
def test_incomplete_checkpoints_of_ours_are_not_restored(change, message):
    converted, _ = convert_checkpoint({'model': classifier()})
    with pytest.raises(CheckpointError, match=message):
        restore_checkpoint({'state_dict': change(converted['state_dict'])})


def test_writing_is_all_or_nothing(tmp_path):
    path = tmp_path / 'out.pth'
    write_checkpoint({'a': torch.ones(1)}, path)
    with pytest.raises(CheckpointError, match='out.pth exists; remove it'):
        write_checkpoint({'a': torch.zeros(1)}, path)
    with pytest.raises(Exception, match=r"Can't (pickle|get) local object"):
        write_checkpoint({'a': torch.zeros(1), 'b': lambda: None}, path, overwrite=True)
    assert read_checkpoint(path)['a'] == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ['out.pth']
    write_checkpoint({'a': torch.zeros(1)}, path, overwrite=True)
    assert read_checkpoint(path)['a'] == 0
    with pytest.raises(CheckpointError, match='is a folder'):
        write_checkpoint({}, tmp_path)
    with pytest.raises(CheckpointError, match='cannot be written'):
        write_checkpoint({}, path / 'below-a-file.pth')


def test_numbers_of_numpy_in_a_runners_checkpoint_are_read(tmp_path):
    torch.save({'meta': {'epoch': np.float64(1.5)}, 'state_dict': {}}, tmp_path / 'runner.pth')
    assert read_checkpoint(tmp_path / 'runner.pth')['meta']['epoch'] == 1.5
