"""Several processes, started by torchrun, that share the images of one run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch

from ssm_backbones.apis.checks import check_device
from ssm_backbones.utils.errors import CommandError

LAUNCHERS = ('none', 'pytorch')
_PATIENCE = timedelta(days=30)

T = TypeVar('T')


@dataclass(frozen=True)
class Processes:
    """This process among those of a run.

    Attributes:
        rank: Its number, from 0.
        world: Their number.
        device: Its device.
    """

    rank: int
    world: int
    device: torch.device

    def share(self, items: Sequence[T], batch_size: int) -> list[T]:
        """Return this process's share of the items: every ``world``-th batch.

        Whole batches are divided, so that a model gets those that one process would give it where images are of one
        size: the size of a batch may change the rounding of its results.
        """
        return [item for place, item in enumerate(items) if place // batch_size % self.world == self.rank]

    def wait(self) -> None:
        """Wait for all processes; if one has died, torchrun ends the others."""
        if self.world > 1:
            torch.distributed.barrier()

    def in_first(self, action: Callable[[], None]) -> None:
        """Call ``action`` in the first process, while the others wait.

        Raises:
            CommandError: In every process, if the action raises one.
        """
        failure = None
        if self.rank == 0:
            try:
                action()
            except CommandError as error:
                failure = error
        if self.world > 1:
            said = [failure and str(failure)]
            torch.distributed.broadcast_object_list(said)
            failure = failure or (CommandError(said[0]) if said[0] else None)
        if failure is not None:
            raise failure

    def gather(self, values: Sequence[T]) -> list[T]:
        """Return the values of all processes, one process's after the other's."""
        if self.world == 1:
            return list(values)
        parts: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(parts, list(values))
        return [value for part in parts for value in part]


@contextmanager
def processes(launcher: str, device: str | None) -> Iterator[Processes]:
    """Enter the group of processes of a run, and leave it at the end.

    Args:
        launcher: ``'none'`` for one process, or ``'pytorch'`` if torchrun has started this one.
        device: ``'cpu'``, ``'cuda'`` or ``'cuda:1'``; by default a GPU where there is one. Of several processes on GPUs
            each takes the one of its local rank.

    Raises:
        CommandError: If there is no such device or launcher, or torchrun has not started this process.
    """
    if launcher not in LAUNCHERS:
        raise CommandError(f'launcher must be one of {", ".join(LAUNCHERS)}, got {launcher!r}.')
    chosen = check_device(device)
    if launcher == 'none':
        yield Processes(0, 1, chosen)
        return
    missing = [name for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK') if name not in os.environ]
    if missing:
        raise CommandError(
            f"launcher='pytorch': {', '.join(missing)} not set; start the processes with "
            'torchrun --nproc_per_node=N tools/... --launcher pytorch.'
        )
    if chosen.type == 'cuda':
        chosen = check_device(f'cuda:{os.environ["LOCAL_RANK"]}')
        torch.cuda.set_device(chosen)
    # Only small messages are exchanged, so gloo is used for GPUs as well. A process that has finished its images waits
    # for the slowest one; if a process dies, the others fail at once.
    torch.distributed.init_process_group('gloo', timeout=_PATIENCE)
    try:
        yield Processes(torch.distributed.get_rank(), torch.distributed.get_world_size(), chosen)
    finally:
        torch.distributed.destroy_process_group()
