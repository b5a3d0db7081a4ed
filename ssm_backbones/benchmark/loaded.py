"""A training step on a machine with other work: one of its cores is busy meanwhile."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from math import prod

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ssm_backbones.benchmark.backbones import backbone_call
from ssm_backbones.benchmark.comparison import Comparison, DetailedCall, Pair, passes
from ssm_backbones.benchmark.timing import Call

# To the other backbone's time.
TARGET = 1.1


def loaded_comparison(name: str, against: str = 'swin-tiny', batch: int = 4, size: int = 224) -> Comparison:
    """Compare a backbone's forward and backward pass with another's while one core is busy.

    Args:
        name: Key of :data:`~ssm_backbones.benchmark.backbones.BACKBONES`.
        against: Key of the other.
        batch: Batch size.
        size: Side of the images.
    """
    return Comparison(
        f'loaded/{name}/{passes(True)}/batch-{batch}',
        f'{passes(True)} at {size}x{size}, batch {batch}, while another process keeps one core busy',
        {
            name: partial(_with_count, name, batch, size),
            against: partial(backbone_call, against, batch, size, True),
        },
        (Pair(name, against, TARGET),),
        devices=('cpu',),
        images=batch,
        during=busy_core,
    )


@contextmanager
def busy_core() -> Iterator[int]:
    """Keep the last of this process's cores busy with another process, which also ends when this one is killed.

    Yields:
        The other process's id, once it is at work.
    """
    core = max(os.sched_getaffinity(0))
    lines = (
        'import os',
        f'os.sched_setaffinity(0, {{{core}}})',
        'print(flush=True)',
        f'while os.getppid() == {os.getpid()}: pass',
    )
    with subprocess.Popen([sys.executable, '-ISc', '\n'.join(lines)], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            yield process.pid
        finally:
            process.kill()


def parallel_regions(call: Call) -> list[int]:
    """Count the parallel regions of this package's scans in a call, which the CPU kernels run on several threads.

    Each scan, and each one's backward pass, is one region: its kernel is started by a single ``at::parallel_for``,
    which gives a thread 16384 state updates or more.

    Returns:
        State updates of each region: pixels times routes, channels and states.
    """
    with _Regions() as regions:
        call()
    return regions.updates


class _Regions(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.updates: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == 'cuda_ops':
            given = dict(zip((each.name for each in func._schema.arguments), args, strict=False)) | (kwargs or {})
            rates = given['A'] if 'A' in given else given['A_top']
            self.updates.append(prod(given['x'].shape[:3]) * rates.numel())
        return func(*args, **(kwargs or {}))


def _with_count(name: str, batch: int, size: int, device: torch.device) -> DetailedCall:
    call = backbone_call(name, batch, size, True, device)
    updates = parallel_regions(call)
    return DetailedCall(
        call,
        {
            'parallel regions of its scans': len(updates),
            'smallest, state updates': min(updates, default=0),
            'largest, state updates': max(updates, default=0),
        },
    )
