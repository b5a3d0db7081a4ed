"""Functions in C++ that only the benchmark has, compiled when they are asked for as the CPU kernels are."""

from __future__ import annotations

import ctypes
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path

import cuda_ops
from cuda_ops import _build


@functools.cache
def native_function(name: str, pointers: int, integers: int) -> Callable[..., None]:
    """Compile ``cuda_ops/csrc/benchmark/NAME.cpp`` for the instruction set in use, and return its function.

    Args:
        name: Of the source without its ending.
        pointers: How many pointers the function takes first.
        integers: How many 64-bit integers then; last comes the number of threads.

    Raises:
        RuntimeError: If it cannot be compiled.
    """
    capability = cuda_ops.backend_status().devices['cpu'].instruction_set
    if capability is None:
        raise RuntimeError(f'{name} is compiled as the compiled library is, which is not there')
    with tempfile.TemporaryDirectory() as folder:
        try:
            library = ctypes.CDLL(str(_build.build_benchmark(name, Path(folder), capability)))
        except _build.BuildError as error:
            raise RuntimeError(f'{name} cannot be compiled: {error}') from error
    function = getattr(library, name)
    function.argtypes = [*[ctypes.c_void_p] * pointers, *[ctypes.c_int64] * integers, ctypes.c_int]
    function.restype = None
    return function
