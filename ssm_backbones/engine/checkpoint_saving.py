"""Writing checkpoints so that a training that is killed, or whose disk is full, keeps the last good one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook
from mmengine.runner import Runner

from ssm_backbones.utils.errors import CommandError
from ssm_backbones.utils.files import PARTIAL_NAME, atomic_file

_BACKEND = 'ssm_backbones_atomic'


@register_backend(_BACKEND, force=True)
class AtomicBackend(LocalBackend):
    """mmengine's local files, each written under a temporary name and then renamed."""

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Write bytes to a file; its folder is created."""
        Path(filepath).parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(filepath) as partial:
            partial.write_bytes(obj)


class AtomicCheckpointHook(CheckpointHook):
    """mmengine's ``CheckpointHook`` that never leaves a training without a whole checkpoint.

    mmengine writes a checkpoint in place, and with ``max_keep_ckpts`` removes the oldest one before it writes: killed
    in between, with ``max_keep_ckpts=1``, nothing is left to resume from.
    """

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict[str, Any]) -> None:
        outdated = None
        if 0 < self.max_keep_ckpts == len(self.keep_ckpt_ids) and self.keep_ckpt_ids[-1] != step:
            # Taken from the list, it is not removed by mmengine before the new one is written.
            outdated = self.keep_ckpt_ids.popleft()
        try:
            super()._save_checkpoint_with_step(runner, step, meta)
        except OSError as error:
            raise CommandError(
                f'the checkpoint {error.filename or self.last_ckpt} cannot be written: {error.strerror or error}. '
                'The one before it is kept: make room and go on from it with --resume.'
            ) from error
        if outdated is not None and is_main_process():
            path = self.file_backend.join_path(self.out_dir, self.filename_tmpl.format(outdated))
            if self.file_backend.isfile(path):
                self.file_backend.remove(path)
            elif self.file_backend.isdir(path):
                # A sharded checkpoint.
                self.file_backend.rmtree(path)


def save_atomically(runner: Runner) -> None:
    """Make the runner's ``CheckpointHook`` an :class:`AtomicCheckpointHook`.

    The config, which is saved for the host libraries' own tools too, goes on naming mmengine's.
    """
    for hook in runner.hooks:
        if type(hook) is CheckpointHook:
            hook.__class__ = AtomicCheckpointHook
            if hook.backend_args is None and hook.file_client_args is None and '://' not in str(hook.out_dir or ''):
                hook.backend_args = dict(backend=_BACKEND)


def remove_partial_files(folder: str | os.PathLike[str]) -> None:
    """Remove the temporary files that a killed training left in its work dir, which no other training may use."""
    for path in Path(folder).glob('.*.part'):
        if PARTIAL_NAME.fullmatch(path.name):
            path.unlink(missing_ok=True)
