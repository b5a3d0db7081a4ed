"""Description of the machine, for reports."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import cuda_ops


def describe_machine(device: str) -> dict[str, Any]:
    """Processor, cores, threads, versions, the instruction set of the compiled scans, and the GPU and its driver."""
    status = cuda_ops.backend_status()
    machine: dict[str, Any] = {
        'CPU': _cpu_model(),
        'cores': len(os.sched_getaffinity(0)),
        'threads': torch.get_num_threads(),
    }
    if torch.device(device).type == 'cuda':
        machine['GPU'] = torch.cuda.get_device_name(device)
        machine['driver'] = _driver()
        machine['CUDA scans'] = str(status.devices['cuda'])
    machine['scans'] = status.devices['cpu'].instruction_set or 'PyTorch reference'
    machine['commit'] = _commit()
    machine['Python'] = platform.python_version()
    for package in ('torch', 'mmengine', 'mmpretrain'):
        try:
            machine[package] = version(package)
        except PackageNotFoundError:
            machine[package] = 'missing'
    return machine


def _cpu_model() -> str:
    try:
        match = re.search(r'^model name\s*:\s*(.+)$', Path('/proc/cpuinfo').read_text(), re.MULTILINE)
    except OSError:
        match = None
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
