"""What is known of the processor."""

import platform
from pathlib import Path

import torch

_CPUINFO = Path('/proc/cpuinfo')


def is_intel_processor() -> bool:
    """Return whether the processor is made by Intel."""
    try:
        return 'GenuineIntel' in _CPUINFO.read_text(encoding='utf-8', errors='replace')
    except OSError:
        # Other systems than Linux.
        return 'GenuineIntel' in platform.processor()


def is_mkl_tuned() -> bool:
    """Return whether MKL, the BLAS of PyTorch's wheels, has kernels that suit the processor.

    It has for Intel's own, and for AMD's with AVX2. With AVX-512 it leaves those of another maker to slower ones.
    """
    return is_intel_processor() or torch.backends.cpu.get_cpu_capability() != 'AVX512'
