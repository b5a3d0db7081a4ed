"""Tell what is compiled, why not, and what serves each device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from cuda_ops import _library
from cuda_ops._version import __version__


@dataclass(frozen=True)
class DeviceStatus:
    """What serves one type of device.

    Attributes:
        present: whether there is such a device.
        backend: 'compiled' or 'reference', the slow one of PyTorch operations.
        reason: why the reference serves the device; empty with compiled kernels.
        instruction_set: that of the compiled CPU kernels ('baseline', 'avx2', 'avx512'); None for the rest.
    """

    present: bool
    backend: str
    reason: str = ''
    instruction_set: str | None = None

    def __str__(self) -> str:
        if not self.present:
            return 'no such device here'
        if self.backend == 'reference':
            return f'PyTorch reference: {self.reason}'
        return 'compiled kernels' + (f', {self.instruction_set} instructions' if self.instruction_set else '')


@dataclass(frozen=True)
class BackendStatus:
    """What :func:`backend_status` returns; as text it is what ``python -m cuda_ops`` prints.

    Attributes:
        version: of this package.
        torch: version of the torch in use.
        compiled: whether the compiled library is in use.
        reason: what it was compiled for, or why it is not in use.
        build: the record of its build: torch, compiler, instruction sets, CUDA version or why there are no CUDA
            kernels; empty where there is none.
        devices: by type, 'cpu' and 'cuda'.
    """

    version: str
    torch: str
    compiled: bool
    reason: str
    build: Mapping[str, object]
    devices: Mapping[str, DeviceStatus]

    @property
    def library(self) -> str:
        """Whether the compiled library is in use, and why (not), in a line."""
        return f'{"in use" if self.compiled else "not in use"}: {self.reason}'

    def __str__(self) -> str:
        rows: list[tuple[str, object]] = [
            ('cuda_ops', self.version),
            ('torch', self.torch),
            ('compiled library', self.library),
        ]
        rows += [(f'  {name}', value) for name, value in self.build.items()]
        rows += self.devices.items()
        return '\n'.join(f'{name:<20} {value}' for name, value in rows)


def backend_status() -> BackendStatus:
    """Tell what is compiled, why not, and which backend serves which device.

    Example::

        status = cuda_ops.backend_status()
        status.devices['cpu'].instruction_set    # 'avx2'
        status.devices['cuda'].backend           # 'compiled'
        print(status)                            # as `python -m cuda_ops` does
    """
    found = _library.STATUS
    devices = {}
    for device, present in (('cpu', True), ('cuda', torch.cuda.is_available())):
        compiled = device in found.devices
        devices[device] = DeviceStatus(
            present,
            'compiled' if compiled else 'reference',
            '' if compiled else _library.why_reference(device),
            _library.cpu_capability() if compiled and device == 'cpu' else None,
        )
    return BackendStatus(__version__, torch.__version__, found.compiled, found.reason, dict(found.info), devices)
