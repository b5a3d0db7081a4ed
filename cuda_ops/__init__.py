"""Compiled state-space scans for feature maps: CUDA kernels on GPUs, C++ on CPUs, one PyTorch reference as the oracle.

The package imports torch and nothing else. See the docstrings of the public functions for shapes and equations, and run
``python -m cuda_ops`` to see which backend serves which device.
"""

from cuda_ops._reference_mode import use_reference
from cuda_ops._status import BackendStatus, DeviceStatus, backend_status
from cuda_ops._version import __version__
from cuda_ops.route_scan import cross_selective_scan, line_scan
from cuda_ops.sequence_scan import selective_scan
from cuda_ops.wavefront_scan import wavefront_scan

__all__ = [
    'BackendStatus',
    'DeviceStatus',
    '__version__',
    'backend_status',
    'cross_selective_scan',
    'line_scan',
    'selective_scan',
    'use_reference',
    'wavefront_scan',
]
