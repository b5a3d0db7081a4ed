"""How fast this machine computes the exponentials that the scans mostly consist of."""

import time

import torch

from cuda_ops import _library


def measure_exp_rate(seconds: float = 0.2) -> float:
    """Exponentials a second by the CPU kernels' own vectorised function, on all of torch's threads.

    A scan computes one for each route, pixel, channel and state (a wavefront scan two), so their number over this rate
    is the least time that its forward pass can take. The values measured with lie in the first cache.

    Args:
        seconds: how long to measure; the fastest millisecond or so counts, as other programs may run.

    Raises:
        RuntimeError: if the op library is not compiled.
    """
    if not _library.STATUS.compiled:
        raise RuntimeError(f'the exponential to measure is in the compiled library, and {_library.STATUS.reason}')
    x = torch.linspace(-20, 0, 1024 * torch.get_num_threads())
    repeats, fastest = 4096, float('inf')
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        torch.ops.cuda_ops.exp2_repeatedly(x, repeats)
        fastest = min(fastest, time.perf_counter() - start)
    return x.numel() * repeats / fastest
