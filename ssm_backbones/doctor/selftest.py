"""Test each op once, forward and backward, against the PyTorch reference in float64."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import cuda_ops

from .line import Line, short

# Bound on the largest root mean square error of outputs and gradients, relative to the exact values. Correct results
# are about a hundred times below it; a wrong index or sign is far above.
BOUND = 1e-5
_REMEDY = 'rebuild the ops: pip install -e . --no-build-isolation in the checkout'


def _cases() -> dict[str, tuple[Callable[..., Any], dict[str, Tensor]]]:
    """Yield a call of each op with float64 inputs, of sizes that no vector or chunk divides."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def rates(*shape: int) -> Tensor:
        return -torch.rand(shape, generator=generator, dtype=torch.float64) - 0.1

    grid, channels, states = (2, 19, 13), 21, 3
    x, length = normal(*grid, channels), grid[1] * grid[2]
    lines = dict(
        x=x,
        delta=normal(*grid, channels),
        A=rates(channels, states),
        B=normal(*grid, states),
        C=normal(*grid, states),
        D=normal(channels),
    )
    return {
        'cross_selective_scan': (
            cuda_ops.cross_selective_scan,
            dict(
                x=x,
                delta=normal(*grid, 4, channels),
                A=rates(4, channels, states),
                B=normal(*grid, 4, states),
                C=normal(*grid, 4, states),
                D=normal(4, channels),
                delta_bias=normal(4, channels),
            ),
        ),
        'line_scan': (lambda **given: cuda_ops.line_scan(**given, axis='column', reverse=True), lines),
        'selective_scan': (
            lambda **given: cuda_ops.selective_scan(**given, delta_softplus=True),
            dict(
                u=normal(2, channels, length),
                delta=normal(2, channels, length),
                A=rates(channels, states),
                B=normal(2, states, length),
                C=normal(2, states, length),
                D=normal(channels),
            ),
        ),
        'wavefront_scan': (
            lambda **given: cuda_ops.wavefront_scan(**given, reverse=True),
            dict(
                x=x,
                delta_top=F.softplus(normal(*grid, channels)),
                delta_left=F.softplus(normal(*grid, channels)),
                A_top=rates(channels, states),
                A_left=rates(channels, states),
                B_top=normal(*grid, states),
                B_left=normal(*grid, states),
                C=normal(*grid, states),
                D=normal(channels),
            ),
        ),
    }


def _results(op: Callable[..., Any], inputs: dict[str, Tensor]) -> list[Tensor]:
    """Return the output, and the gradients of its weighted sum in all inputs."""
    leaves = {name: value.detach().clone().requires_grad_() for name, value in inputs.items()}
    output = op(**leaves)
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype, device=output.device).view(output.shape)
    return [output.detach(), *torch.autograd.grad(output, list(leaves.values()), weights)]


def _error(found: Tensor, exact: Tensor) -> float:
    return ((found.cpu().double() - exact).norm() / exact.norm()).item()


def examine_ops(devices: list[str]) -> list[Line]:
    """Report each op's error on each device in float32; broken if above :data:`BOUND` or if it raises."""
    lines = []
    for name, (op, inputs) in _cases().items():
        said, broken = [], False
        with cuda_ops.use_reference():
            exact = _results(op, inputs)
        for device in devices:
            began = time.perf_counter()
            try:
                with warnings.catch_warnings():
                    # The backend of a device is in the report already.
                    warnings.filterwarnings('ignore', message='cuda_ops uses its PyTorch reference')
                    found = _results(op, {key: value.float().to(device) for key, value in inputs.items()})
                # torch's maximum, unlike Python's, is NaN wherever one of them is.
                worst = torch.tensor([_error(*pair) for pair in zip(found, exact, strict=True)]).max().item()
            except Exception as error:
                said.append(f'{device}: {short(error)}')
                broken = True
                continue
            # Written so that a NaN fails.
            right = worst <= BOUND
            verdict = 'right' if right else f'WRONG, allowed is {BOUND:.0e}'
            said.append(f'{device}: error {worst:.0e}, {verdict} ({time.perf_counter() - began:.2f} s)')
            broken |= not right
        lines.append(Line(name, '; '.join(said), _REMEDY if broken else '', broken))
    return lines
