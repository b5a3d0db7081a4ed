"""Description of the machine, for reports."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import cuda_ops
from ssm_backbones.utils.processor import bfloat16_instructions, cpuinfo

# Cap the instruction sets of oneDNN and of MKL, on which times depend.
_CAPS = ('ONEDNN_MAX_CPU_ISA', 'MKL_ENABLE_INSTRUCTIONS')


def describe_machine(device: str) -> dict[str, Any]:
    """Processor, cores, threads, versions, the instruction sets in use, and the GPU and its driver."""
    status = cuda_ops.backend_status()
    machine: dict[str, Any] = {
        'CPU': _cpu_model(),
        'bfloat16': ' '.join(bfloat16_instructions()) or 'emulated',
        'cores': len(os.sched_getaffinity(0)),
        'threads': torch.get_num_threads(),
    }
    if torch.device(device).type == 'cuda':
        machine['GPU'] = torch.cuda.get_device_name(device)
        machine['driver'] = _driver()
        machine['CUDA scans'] = str(status.devices['cuda'])
    machine['scans'] = status.devices['cpu'].instruction_set or 'PyTorch reference'
    machine['ATen'] = torch.backends.cpu.get_cpu_capability()
    machine |= {name: os.environ[name] for name in _CAPS if name in os.environ}
    machine['commit'] = _commit()
    machine['Python'] = platform.python_version()
    for package in ('torch', 'mmengine', 'mmpretrain', 'timm', 'transformers', 'mambapy'):
        with suppress(PackageNotFoundError):
            machine[package] = version(package)
    return machine


def _cpu_model() -> str:
    match = re.search(r'^model name\s*:\s*(.+)$', cpuinfo(), re.MULTILINE)
    return match.group(1) if match else platform.processor() or platform.machine()


def _driver() -> str:
    return _first_line('nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader')


def _commit() -> str:
    return _first_line('git', '-C', str(Path(__file__).parent), 'describe', '--always', '--dirty')


def _first_line(*command: str) -> str:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return 'unknown'
    return result.stdout.splitlines()[0] if result.returncode == 0 and result.stdout else 'unknown'
