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


def test_a_published_checkpoint_is_named_with_its_own_digest(tmp_path) -> None:
    hook = AtomicCheckpointHook(out_dir=str(tmp_path), published_keys=['state_dict', 'meta'])
    hook.before_train(make_runner(tmp_path))
    weights = {'layer.weight': torch.arange(3.0)}
    torch.save({'state_dict': weights, 'optimizer': {'lr': 1}}, tmp_path / 'epoch_1.pth')
    hook.last_ckpt = str(tmp_path / 'epoch_1.pth')
    hook.after_train(make_runner(tmp_path))
    (published,) = tmp_path.glob('epoch_1-*.pth')
    folder = str(tmp_path / 'downloads')
    loaded = torch.hub.load_state_dict_from_url(published.as_uri(), folder, check_hash=True, progress=False)
    assert loaded.keys() == {'state_dict'} and torch.equal(loaded['state_dict']['layer.weight'], torch.arange(3.0))
