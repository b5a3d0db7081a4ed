"""How fast this machine computes the exponentials that the scans mostly consist of."""

import time

import torch

from cuda_ops import _library


def measure_exp_rate(seconds: float = 0.2) -> float:
    """Exponentials a second by the CPU kernels' own vectorised function, on all of torch's threads.

    A scan computes one for each route, pixel, channel and state (a wavefront scan two), so their number over this rate
    is the least time that its forward pass can take. The values measured with lie in the first cache.

    Args:
        seconds: about how long to measure; the fastest of five equal parts counts.

    Raises:
        RuntimeError: if the op library is not compiled.
    """
    if not _library.STATUS.compiled:
        raise RuntimeError(f'the exponential to measure is in the compiled library, and {_library.STATUS.reason}')
    x = torch.linspace(-20, 0, 1024 * torch.get_num_threads())
    repeats, elapsed = 64, 0.0
    while elapsed < seconds / 5:
        repeats *= 2
        elapsed = _time(x, repeats)
    return x.numel() * repeats / min(elapsed, *(_time(x, repeats) for _ in range(4)))


def _time(x: torch.Tensor, repeats: int) -> float:
    start = time.perf_counter()
    torch.ops.cuda_ops.exp2_repeatedly(x, repeats)
    return time.perf_counter() - start
