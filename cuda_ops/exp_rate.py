"""How fast this machine computes the exponentials that the scans mostly consist of."""

import time
from collections.abc import Callable

import torch

from cuda_ops import _library

# Exponentials of each element in one launch on a GPU.
_GPU_REPEATS = 4096
# The instruction that the CUDA kernels use. 2^-x again and again stays near 0.64; what an element has to wait for its
# own last result, others fill.
_GPU_SOURCE = """
template <typename T> T exp2_repeatedly(T x) {
  float y = x;
  #pragma unroll 16
  for (int i = 0; i < REPEATS; ++i) asm volatile("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(-y));
  return y;
}
""".replace('REPEATS', str(_GPU_REPEATS))


def measure_exp_rate(seconds: float = 0.2, device: str = 'cpu') -> float:
    """Exponentials a second, on all of torch's threads or all of a GPU.

    A scan computes one for each route, pixel, channel and state (a wavefront scan two), so their number over this rate
    is the least time that its forward pass can take. On the CPU it is the rate of the kernels' own vectorised function,
    on values that lie in the first cache; on a GPU that of its special function units, by the kernels' instruction.

    Args:
        seconds: how long to measure; the fastest millisecond or so counts, as other programs may run.
        device: 'cpu', 'cuda' or 'cuda:1'.

    Raises:
        RuntimeError: if the op library is not compiled, or torch cannot compile for the GPU at run time.
    """
    count, compute, wait = _on_cpu() if torch.device(device).type == 'cpu' else _on_gpu(device)
    fastest = float('inf')
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        wait()
        start = time.perf_counter()
        compute()
        wait()
        fastest = min(fastest, time.perf_counter() - start)
    return count / fastest


_Measured = tuple[int, Callable[[], object], Callable[[], object]]


def _on_cpu() -> _Measured:
    if not _library.STATUS.compiled:
        raise RuntimeError(f'the exponential to measure is in the compiled library, and {_library.STATUS.reason}')
    x = torch.linspace(-20, 0, 1024 * torch.get_num_threads())
    repeats = 4096
    return x.numel() * repeats, lambda: torch.ops.cuda_ops.exp2_repeatedly(x, repeats), lambda: None


def _on_gpu(device: str) -> _Measured:
    from torch.cuda.jiterator import _create_jit_fn

    x = torch.rand(2**20, device=device)
    # Compiled at its first call, by the compiler that torch brings along.
    exp2_repeatedly = _create_jit_fn(_GPU_SOURCE)
    exp2_repeatedly(x)
    return x.numel() * _GPU_REPEATS, lambda: exp2_repeatedly(x), lambda: torch.cuda.synchronize(device)
