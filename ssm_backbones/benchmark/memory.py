"""Peak memory of a call: from the allocator on a GPU, in a new process on the CPU."""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ssm_backbones.benchmark.timing import Call

# glibc's numbers of these options, from malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_START = 'from ssm_backbones.benchmark.memory import main; main()'


def peak_bytes(call: Call, device: torch.device, warm_up: bool = False) -> int:
    """Bytes that a call takes at most beyond what is held before it.

    On the CPU it is the growth of the process's resident memory, with every large block taken from the system and given
    back to it at once: what the C library would keep of freed memory differs from run to run. Linux with glibc alone
    can do that.

    Args:
        call: What to measure.
        device: Where it computes.
        warm_up: Call once before, because what a process's first call reads of code from the disk stays.
    """
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    with _blocks_from_the_system():
        if warm_up:
            call()
        # The recorded peak falls back to the present size, and what the start-up took no longer counts.
        Path('/proc/self/clear_refs').write_text('5')
        before = _resident_bytes('VmRSS')
        call()
        return _resident_bytes('VmHWM') - before


def peak_bytes_in_new_process(prepare: str, arguments: list[Any], device: str, what: str) -> int:
    """Measure :func:`peak_bytes` in a new process, free of earlier allocations.

    Args:
        prepare: ``'module:function'``, a function that takes the arguments and the device and returns the call.
        arguments: Of JSON's types.
        device: As torch names devices.
        what: Is measured, for the message where it cannot be.

    Raises:
        RuntimeError: If the process fails.
    """
    given = json.dumps(dict(prepare=prepare, arguments=arguments, device=device, threads=torch.get_num_threads()))
    path = os.pathsep.join([str(Path(__file__).resolve().parents[2]), *filter(None, [os.environ.get('PYTHONPATH')])])
    result = subprocess.run(
        [sys.executable, '-c', _START, given], capture_output=True, text=True, env=os.environ | {'PYTHONPATH': path}
    )
    if result.returncode:
        reason = (result.stderr.strip() or f'it ended with status {result.returncode}').splitlines()[-1]
        raise RuntimeError(f'the peak memory of {what} could not be measured: {reason}')
    return int(result.stdout.split()[-1])


def main() -> None:
    """Measure the call that the argument describes, and print the bytes."""
    given = json.loads(sys.argv[1])
    torch.set_num_threads(given['threads'])
    module, _, name = given['prepare'].partition(':')
    device = torch.device(given['device'])
    call = getattr(importlib.import_module(module), name)(*given['arguments'], device)
    print(peak_bytes(call, device, warm_up=True))


@contextmanager
def _blocks_from_the_system() -> Iterator[None]:
    gc.collect()
    library = ctypes.CDLL(None)
    if not hasattr(library, 'mallopt') or not Path('/proc/self/clear_refs').exists():
        raise RuntimeError('peak memory on the CPU is measured on Linux with glibc alone')
    library.mallopt(_M_MMAP_THRESHOLD, 1 << 16)
    library.malloc_trim(0)
    try:
        yield
    finally:
        # What glibc's own thresholds grow to where large blocks come and go.
        library.mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        library.mallopt(_M_TRIM_THRESHOLD, 64 << 20)


def _resident_bytes(kind: str) -> int:
    match = re.search(rf'^{kind}:\s+(\d+) kB', Path('/proc/self/status').read_text(), re.MULTILINE)
    if match is None:
        raise RuntimeError(f'/proc/self/status does not tell {kind}')
    return int(match.group(1)) * 1024
