"""Scans as a data set, which test_processes.py has workers compute."""

from __future__ import annotations

import torch
from torch.utils.data import Dataset

import cuda_ops


def scan(seed: int) -> torch.Tensor:
    """Output and gradients of a scan on a map that several threads share, as one row."""
    generator = torch.Generator().manual_seed(seed)
    x, delta = torch.randn(2, 24, 24, 96, generator=generator), torch.randn(2, 24, 24, 96, generator=generator)
    A = -torch.rand(96, 2, generator=generator)
    inputs = [value.requires_grad_() for value in (x, delta, A)]
    output = cuda_ops.line_scan(*inputs, None, None, axis='row')
    return torch.cat([value.flatten() for value in (output, *torch.autograd.grad(output.square().sum(), inputs))])


class Scans(Dataset):
    """Scans, computed by whoever reads them."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> torch.Tensor:
        return scan(index).detach()
