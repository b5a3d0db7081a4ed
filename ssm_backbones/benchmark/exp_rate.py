"""Measure the rate of exponentials, which dominate the scans' arithmetic."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from ssm_backbones.benchmark.native import native_function

# Values of a block, which the compiled function takes at a time.
_BLOCK = 1024
_CPU_REPEATS = 4096
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
    """Measure exponentials per second, on all of torch's threads or a whole GPU.

    A scan computes one for each route, pixel, channel and state (a wavefront scan two), so their number over this rate
    is the least time that its forward pass can take. On the CPU it is the rate of the kernels' own vectorised function,
    on values in the L1 cache; on a GPU that of its special function units, by the kernels' instruction.

    Args:
        seconds: How long to measure; the fastest millisecond or so counts, as other programs may run.
        device: 'cpu', 'cuda' or 'cuda:1'.

    Raises:
        RuntimeError: If the function cannot be compiled, on a GPU by torch at run time.
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


def exp2_repeatedly(x: Tensor, repeats: int) -> Tensor:
    """Compute 2^x ``repeats`` times over by the CPU kernels' vectorised function, on all of torch's threads.

    Args:
        x: float32 values, contiguous and on the CPU, whole blocks of 1024.
        repeats: At least 1.

    Raises:
        TypeError: If ``x`` is not float32.
        ValueError: If ``x`` does not have that form, or ``repeats`` is less than 1.
        RuntimeError: If the function cannot be compiled.
    """
    if x.dtype != torch.float32:
        raise TypeError(f'x must be float32, got {x.dtype}')
    if x.device.type != 'cpu' or not x.is_contiguous():
        raise ValueError('x must be contiguous and on the CPU')
    if x.numel() % _BLOCK:
        raise ValueError(f'x must hold whole blocks of {_BLOCK} values, got {x.numel()}')
    if repeats < 1:
        raise ValueError(f'repeats must be at least 1, got {repeats}')
    y = torch.empty_like(x)
    compiled = native_function('exp2_repeatedly', 2, 2)
    compiled(x.data_ptr(), y.data_ptr(), x.numel() // _BLOCK, repeats, torch.get_num_threads())
    return y


_Measured = tuple[int, Callable[[], object], Callable[[], object]]


def _on_cpu() -> _Measured:
    x = torch.linspace(-20, 0, _BLOCK * torch.get_num_threads())
    exp2_repeatedly(x, 1)
    return x.numel() * _CPU_REPEATS, lambda: exp2_repeatedly(x, _CPU_REPEATS), lambda: None


def _on_gpu(device: str) -> _Measured:
    from torch.cuda.jiterator import _create_jit_fn

    x = torch.rand(2**20, device=device)
    # Compiled at its first call, by the compiler that torch brings along.
    compute = _create_jit_fn(_GPU_SOURCE)
    compute(x)
    return x.numel() * _GPU_REPEATS, lambda: compute(x), lambda: torch.cuda.synchronize(device)
