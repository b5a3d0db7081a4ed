"""What is known of the processor."""

import platform
import re
from pathlib import Path

import torch

_CPUINFO = Path('/proc/cpuinfo')


def cpuinfo() -> str:
    """Return what Linux says of the processor, or '' on other systems."""
    try:
        return _CPUINFO.read_text(encoding='utf-8', errors='replace')
    except OSError:
        return ''


def is_intel_processor() -> bool:
    """Return whether the processor is made by Intel."""
    return 'GenuineIntel' in (cpuinfo() or platform.processor())


def bfloat16_instructions() -> list[str]:
    """Return the processor's instruction sets for bfloat16 as Linux names them, such as ``amx_bf16``."""
    return sorted(set(re.findall(r'\b(?:\w+_)?bf16\b', cpuinfo())))


def is_mkl_tuned() -> bool:
    """Return whether MKL, the BLAS of PyTorch's wheels, has kernels that suit the processor.

    It has for Intel's own, and for AMD's without AVX-512. With AVX-512 it leaves those of another maker to slower ones.
    """
    found = cpuinfo()
    has_avx512 = 'avx512f' in found if found else torch.backends.cpu.get_cpu_capability() == 'AVX512'
    return is_intel_processor() or not has_avx512
