"""Writing checkpoints so that a training that is killed, or whose disk is full, keeps the last good one."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import master_only
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook
from mmengine.runner import CheckpointLoader, Runner

from ssm_backbones.utils.errors import CommandError
from ssm_backbones.utils.files import PARTIAL_NAME, atomic_file

BACKEND = 'ssm_backbones_atomic'


@register_backend(BACKEND, force=True)
class AtomicBackend(LocalBackend):
    """mmengine's local files, each written under a temporary name and then renamed."""

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Write bytes to a file; its folder is created."""
        Path(filepath).parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(filepath) as partial:
            partial.write_bytes(obj)


class _RemovingLater:
    """A file backend that only notes what it is to remove."""

    def __init__(self, backend: Any) -> None:
        self.backend = backend
        self.outdated: list[tuple[Callable[[str], None], str]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def remove(self, path: str) -> None:
        self.outdated.append((self.backend.remove, path))

    def rmtree(self, path: str) -> None:
        # A sharded checkpoint.
        self.outdated.append((self.backend.rmtree, path))


class AtomicCheckpointHook(CheckpointHook):
    """mmengine's ``CheckpointHook`` that never leaves a training without a whole checkpoint.

    mmengine writes a checkpoint in place, and removes the one that it replaces (the oldest of ``max_keep_ckpts``, the
    best so far of ``save_best``) before it writes: killed in between, nothing is left to resume from.
    """

    file_backend: Any

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict[str, Any]) -> None:
        with self._removing_last():
            super()._save_checkpoint_with_step(runner, step, meta)

    def _save_best_checkpoint(self, runner: Runner, metrics: dict[str, Any]) -> None:
        with self._removing_last():
            super()._save_best_checkpoint(runner, metrics)

    @master_only
    def _publish_model(self, runner: Runner, ckpt_path: str) -> None:
        """Write ``published_keys`` of a checkpoint into a file that is named with the first digits of its SHA-256.

        mmengine's digits are of other bytes, so that ``check_hash`` of ``torch.hub`` refuses its files
        (findings/mmengine-published-digest.sh).
        """
        if not ckpt_path:  # a metric of save_best that was never measured
            return
        checkpoint = CheckpointLoader.load_checkpoint(ckpt_path, map_location='cpu')
        published = {key: checkpoint[key] for key in self.published_keys or () if key in checkpoint}
        missing = [key for key in self.published_keys or () if key not in checkpoint]
        if missing:
            runner.logger.warning(
                f'published_keys {missing}: {ckpt_path} has no such keys, it has {list(checkpoint)}'
                + ('.' if published else '; nothing is published.')
            )
        if not published:
            return
        buffer = io.BytesIO()
        torch.save(published, buffer)
        digits = hashlib.sha256(buffer.getvalue()).hexdigest()[:8]
        path = f'{os.path.splitext(ckpt_path)[0]}-{digits}.pth'
        try:
            self.file_backend.put(buffer.getvalue(), path)
        except OSError as error:
            raise CommandError(
                f'the published checkpoint {error.filename or path} cannot be written: {error.strerror or error}. '
                f'{ckpt_path} is whole: make room, load it, and save the published_keys of it with torch.save.'
            ) from error
        runner.logger.info(f'The checkpoint {ckpt_path} is published as {path}')

    @contextlib.contextmanager
    def _removing_last(self) -> Iterator[None]:
        backend = self.file_backend
        self.file_backend = later = _RemovingLater(backend)
        try:
            yield
        except OSError as error:
            raise CommandError(
                f'the checkpoint {error.filename or self.last_ckpt} cannot be written: {error.strerror or error}. '
                'The one before it is kept: make room and go on from it with --resume.'
            ) from error
        finally:
            self.file_backend = backend
        # A training that was resumed may have written a file of the same name anew.
        current = [self.last_ckpt, getattr(self, 'best_ckpt_path', None)]
        current += getattr(self, 'best_ckpt_path_dict', {}).values()
        written = {os.path.realpath(path) for path in current if path}
        for remove, path in later.outdated:
            if os.path.realpath(path) not in written:
                remove(path)


def save_atomically(runner: Runner) -> None:
    """Make the runner's ``CheckpointHook`` an :class:`AtomicCheckpointHook`.

    The config, which is saved for the host libraries' own tools too, goes on naming mmengine's.
    """
    for hook in runner.hooks:
        if type(hook) is CheckpointHook:
            hook.__class__ = AtomicCheckpointHook
            if hook.backend_args is None and hook.file_client_args is None and '://' not in str(hook.out_dir or ''):
                hook.backend_args = dict(backend=BACKEND)


def remove_partial_files(folder: str | os.PathLike[str]) -> None:
    """Remove the temporary files that a killed training left in its work dir, which no other training may use."""
    for path in Path(folder).glob('.*.part'):
        if PARTIAL_NAME.fullmatch(path.name):
            path.unlink(missing_ok=True)
