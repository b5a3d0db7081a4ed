"""Tests of this folder need a GPU and a library with CUDA kernels; elsewhere each says why it is skipped."""

from pathlib import Path

import pytest
import torch

import cuda_ops

FOLDER = Path(__file__).parent


def pytest_configure(config: pytest.Config) -> None:
    """Declare the mark, for ``pytest -m gpu``."""
    config.addinivalue_line('markers', 'gpu: needs a GPU and a library with CUDA kernels')


def _obstacle() -> str:
    if not torch.cuda.is_available():
        return 'there is no GPU'
    status = cuda_ops.backend_status().devices['cuda']
    if status.backend != 'compiled':
        return f'cuda_ops has no CUDA kernels: {status.reason}'
    return ''


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of this folder, and skip them where they cannot run."""
    obstacle = _obstacle()
    for item in items:
        if FOLDER in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if obstacle:
                item.add_marker(pytest.mark.skip(reason=obstacle))
