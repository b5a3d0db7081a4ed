"""Check Python, PyTorch, NumPy, the compilers and the GPUs."""

from __future__ import annotations

import importlib
import platform
import shutil
import subprocess
import sys
from typing import Any

from .line import Line, short

_TORCH_REMEDY = 'reinstall it, as https://pytorch.org says'


def import_torch() -> tuple[Any, Line]:
    """Return PyTorch, or None if it cannot be imported, and a line on it."""
    try:
        torch = importlib.import_module('torch')
        torch.ones(2).sum().item()
    except Exception as error:
        return None, Line('torch', short(error), _TORCH_REMEDY, broken=True)
    return torch, Line('torch', f'{torch.__version__}, {torch_build(torch)}')


def torch_build(torch: Any) -> str:
    """Describe the platform that a torch was built for."""
    if getattr(torch.version, 'hip', None):
        return f'built for ROCm {torch.version.hip}'
    return f'built for CUDA {torch.version.cuda}' if torch.version.cuda else 'a CPU build'


def python_line() -> Line:
    """Report the running Python; one without a global interpreter lock is not served."""
    text = f'{platform.python_version()}, {sys.executable}'
    if not getattr(sys, '_is_gil_enabled', lambda: True)():
        remedy = 'free-threaded Python is not tested, and mmcv and others are not built for it; use the usual build'
        return Line('Python', f'{text}, without a global interpreter lock', remedy)
    return Line('Python', text)


def numpy_line(torch: Any) -> Line:
    """Report NumPy's version, and whether PyTorch can use it."""
    try:
        numpy = importlib.import_module('numpy')
        if torch is not None:
            torch.from_numpy(numpy.ones(2)).numpy()
    except Exception as error:
        return Line('numpy', short(error), "for an older torch: pip install 'numpy<2'", broken=True)
    return Line('numpy', f'{numpy.__version__}{"" if torch is None else ", works with torch"}')


def compiler_lines() -> list[Line]:
    """Report the compilers that the ops would be built with; built ops do not need them."""
    build = importlib.import_module('cuda_ops._build')
    try:
        command = build.find_compiler()
        lines = [Line('C++', f'{build.compiler_version(command)}, {shutil.which(command[0])}')]
    except Exception as error:
        lines = [Line('C++', f'none: {short(error)}')]
    try:
        toolkit = build.find_toolkit()
    except Exception as error:
        return [*lines, Line('nvcc', short(error))]
    return [*lines, Line('nvcc', f'{toolkit.version}, {toolkit.nvcc}' if toolkit else 'none')]


def gpu_lines(torch: Any) -> list[Line]:
    """Report the GPUs that PyTorch sees, or the driver's message if it sees none."""
    driver = _ask_driver()
    lines = [Line('driver', '; '.join(driver) if driver else 'no NVIDIA driver answers (nvidia-smi)')]
    if torch is None:
        return lines
    try:
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        for index in range(count):
            gpu = torch.cuda.get_device_properties(index)
            memory = f'{gpu.total_memory / 2**30:.0f} GiB'
            lines.append(Line(f'GPU {index}', f'{gpu.name}, {memory}, compute capability {gpu.major}.{gpu.minor}'))
    except Exception as error:
        return [*lines, Line('GPU', short(error), _TORCH_REMEDY, broken=True)]
    if count:
        return lines
    if driver and torch.version.cuda is None:
        return [*lines, Line('GPU', 'not used, for this torch is not built for CUDA', 'install a torch built for CUDA')]
    if driver:
        remedy = f'CUDA_VISIBLE_DEVICES hides it, or the driver is too old for CUDA {torch.version.cuda}'
        return [*lines, Line('GPU', 'there is one that torch does not see', remedy)]
    return [*lines, Line('GPU', 'none')]


def _ask_driver() -> list[str]:
    command = ['nvidia-smi', '--query-gpu=driver_version,name', '--format=csv,noheader']
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    if result.returncode:
        return []
    return sorted({line.strip() for line in result.stdout.splitlines() if line.strip()})
