"""When checkpoints are removed; test_kills.py kills trainings."""

import logging
import types
from pathlib import Path

import pytest
import torch
from mmengine.logging import MessageHub

from ssm_backbones.engine.checkpoint_saving import AtomicCheckpointHook
from ssm_backbones.utils.errors import CommandError


@pytest.fixture
def hook(tmp_path):
    hook = AtomicCheckpointHook(out_dir=str(tmp_path), max_keep_ckpts=1, save_best='acc', rule='greater')
    hook.before_train(make_runner(tmp_path))
    return hook


def make_runner(folder: Path, epoch: int = 0, write=lambda folder: None) -> types.SimpleNamespace:
    def save_checkpoint(out_dir, filename, *args, **options) -> None:
        write(Path(out_dir))
        Path(out_dir, filename).touch()

    return types.SimpleNamespace(
        work_dir=str(folder),
        epoch=epoch,
        iter=10 * epoch,
        message_hub=MessageHub.get_instance(str(folder)),
        logger=logging.getLogger(__name__),
        save_checkpoint=save_checkpoint,
    )


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.glob('*.pth')}


def test_what_is_replaced_is_removed_last(hook, tmp_path) -> None:
    held = []
    for epoch in (1, 2):
        runner = make_runner(tmp_path, epoch, lambda folder: held.append(names(folder)))
        hook._save_checkpoint(make_runner(tmp_path, epoch - 1))
        hook._save_best_checkpoint(runner, {'acc': epoch})
    before = {'epoch_2.pth', 'best_acc_epoch_1.pth'}
    assert held[2:] == [before, before | {'best_acc_epoch_2.pth'}]
    assert names(tmp_path) == {'epoch_2.pth', 'best_acc_epoch_2.pth'}


def test_a_best_checkpoint_written_again_is_kept(hook, tmp_path) -> None:
    """As where a training was resumed before it; also under another spelling of the work dir."""
    hook.best_ckpt_path = f'{tmp_path}/./best_acc_epoch_1.pth'
    (tmp_path / 'best_acc_epoch_1.pth').touch()
    hook._save_best_checkpoint(make_runner(tmp_path, 1), {'acc': 1})
    assert names(tmp_path) == {'best_acc_epoch_1.pth'}


def test_a_best_checkpoint_that_cannot_be_written_leaves_the_former(hook, tmp_path) -> None:
    def fail(folder: Path) -> None:
        raise OSError(28, 'No space left on device', str(folder / 'best_acc_epoch_2.pth'))

    hook._save_best_checkpoint(make_runner(tmp_path, 1), {'acc': 1})
    with pytest.raises(CommandError, match=r'best_acc_epoch_2\.pth cannot be written: No space left'):
        hook._save_best_checkpoint(make_runner(tmp_path, 2, fail), {'acc': 2})
    assert names(tmp_path) == {'best_acc_epoch_1.pth'}


@pytest.fixture
def publish(tmp_path):
    """Publish keys of a checkpoint at the end of a training."""
    torch.save({'state_dict': {'layer.weight': torch.arange(3.0)}, 'optimizer': {'lr': 1}}, tmp_path / 'epoch_1.pth')

    def call(*keys: str, save_best=None) -> AtomicCheckpointHook:
        hook = AtomicCheckpointHook(out_dir=str(tmp_path), published_keys=keys, save_best=save_best, rule='greater')
        hook.before_train(make_runner(tmp_path))
        hook.last_ckpt = str(tmp_path / 'epoch_1.pth')
        hook.after_train(make_runner(tmp_path))
        return hook

    return call


def test_a_published_checkpoint_is_named_with_its_own_digest(publish, tmp_path) -> None:
    publish('state_dict')
    (published,) = tmp_path.glob('epoch_1-*.pth')
    folder = str(tmp_path / 'downloads')
    loaded = torch.hub.load_state_dict_from_url(published.as_uri(), folder, check_hash=True, progress=False)
    assert loaded.keys() == {'state_dict'} and torch.equal(loaded['state_dict']['layer.weight'], torch.arange(3.0))


def test_published_keys_that_a_checkpoint_lacks_are_named(publish, tmp_path, caplog) -> None:
    publish('state_dcit')
    assert names(tmp_path) == {'epoch_1.pth'} and "['state_dcit']" in caplog.text and 'nothing' in caplog.text
    publish('state_dict', 'meta')
    assert len(names(tmp_path)) == 2 and "['meta']" in caplog.text


def test_a_metric_that_was_never_measured_has_nothing_to_publish(publish, tmp_path) -> None:
    publish('state_dict', save_best=['acc', 'mIoU'])
    assert len(names(tmp_path)) == 2


def test_no_room_to_publish_leaves_the_checkpoint(publish, tmp_path, monkeypatch) -> None:
    def put(self, obj: bytes, path: str) -> None:
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr('mmengine.fileio.LocalBackend.put', put)
    with pytest.raises(CommandError, match=r'epoch_1-\w{8}\.pth cannot be written: No space.*epoch_1\.pth is whole'):
        publish('state_dict')
    assert names(tmp_path) == {'epoch_1.pth'}
