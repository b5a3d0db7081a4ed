"""What the tests of the ops share as fixtures, and which kernels they test."""

from collections.abc import Iterator

import pytest
import torch

import cuda_ops


def pytest_report_header() -> str:
    """The kernels under test, which the tests of other instruction sets read as well."""
    status = cuda_ops.backend_status()
    if not status.compiled:
        return f'cuda_ops: not compiled: {status.reason}'
    return f'cuda_ops: {status.devices["cpu"].instruction_set} kernels'


@pytest.fixture
def nan_in_fresh_memory() -> Iterator[None]:
    """Every tensor allocated without values is NaN, so that what a kernel does not write shows."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty_like(torch.zeros(8)).isnan().all(), 'fresh memory is not poisoned'
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture
def threads() -> Iterator[None]:
    """The number of threads is put back after the test."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
