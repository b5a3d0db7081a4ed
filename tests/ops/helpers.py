"""What the tests of all ops share: the tolerance table and the comparison with an exact result.

A comparison runs an op three times on the same rounded inputs: compiled, by the library's PyTorch reference, and by a
plain loop in float64, which is exact for this purpose. The compiled op may lose at most twice what the reference loses.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import cuda_ops

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Tolerance:
    """How far a result may be from the exact one.

    Attributes:
        floor: root mean square error, relative to that of the exact values, allowed beside twice the reference's own.
        largest: error of any single value, relative to its own magnitude plus the root mean square of the tensor.
    """

    floor: float
    largest: float


# The one table for every op and every test; a result that misses it is a defect of the op, not of the table. The floor
# is the error of rounding an exact result once in half precision; in float32 and float64, where inputs and arithmetic
# share the precision, that of the eight or so roundings that any evaluation of a single value takes.
TOLERANCES = {
    torch.float64: Tolerance(floor=2e-15, largest=1e-13),
    torch.float32: Tolerance(floor=1e-6, largest=1e-5),
    torch.float16: Tolerance(floor=5e-4, largest=8e-3),
    torch.bfloat16: Tolerance(floor=4e-3, largest=6e-2),
}
DTYPES = tuple(TOLERANCES)
# GPUs take 2^x and 1/x from their special function unit, whose 2^x may be wrong by four units in the last place.
CUDA_FLOAT32 = Tolerance(floor=4e-6, largest=4e-5)


def dtype_name(dtype: torch.dtype) -> str:
    """A short name, for the ids of tests."""
    return str(dtype).removeprefix('torch.')


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which an op on maps of ``dtype`` takes its parameters."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def relative_error(got: Tensor, exact: Tensor) -> float:
    """Root mean square error relative to the root mean square of the exact values; 0 where nothing differs."""
    difference = (got.double() - exact).norm().item()
    return difference and difference / exact.norm().item() if exact.norm() > 0 else difference


def largest_error(got: Tensor, exact: Tensor) -> float:
    """The largest error of a single value, relative to its magnitude plus the root mean square of the tensor."""
    if not exact.numel() or torch.equal(got.double(), exact):
        return 0.0
    scale = exact.abs() + exact.square().mean().sqrt()
    return ((got.double() - exact).abs() / scale).max().item()


def tolerance(dtype: torch.dtype, cuda: bool) -> Tolerance:
    """The table's entry, for CUDA kernels or for others."""
    return CUDA_FLOAT32 if cuda and dtype == torch.float32 else TOLERANCES[dtype]


def assert_accurate(name: str, got: Tensor, exact: Tensor, reference: Tensor, dtype: torch.dtype, cuda: bool) -> None:
    """Hold one result against the table.

    Args:
        name: what the result is, for the message.
        got: the op's result.
        exact: the float64 loop's.
        reference: the PyTorch reference's, of the same dtype as ``got``.
        dtype: the dtype of the op's maps.
        cuda: whether CUDA kernels computed it.
    """
    assert got.shape == exact.shape, f'{name} has shape {tuple(got.shape)} instead of {tuple(exact.shape)}'
    assert got.dtype == reference.dtype, f'{name} is {got.dtype}, the reference gives {reference.dtype}'
    assert exact.isfinite().all(), f'{name}: the exact result is not finite, the case tests nothing'
    error, allowed = relative_error(got, exact), 2 * relative_error(reference, exact)
    allowed += tolerance(got.dtype, cuda).floor
    assert error <= allowed, f'{name} ({dtype}): root mean square error {error:.3g}, allowed {allowed:.3g}'
    error, allowed = largest_error(got, exact), tolerance(dtype, cuda).largest
    assert error <= allowed, f'{name} ({dtype}): largest error {error:.3g}, allowed {allowed:.3g}'


def differentiate(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Mapping[str, Tensor | None],
    options: Mapping[str, Any],
    weights: list[Tensor] | None = None,
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Call ``function`` and differentiate a weighted sum of its outputs in every input.

    Returns:
        Outputs (``output0``...) and gradients (``grad x``...) by name, and the outputs' weights: those given, or random
        ones.
    """
    leaves = {name: None if value is None else value.detach().requires_grad_() for name, value in inputs.items()}
    outputs = function(**leaves, **options)
    outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
    if weights is None:
        weights = [torch.randn(output.shape, dtype=torch.float64).to(output.dtype) for output in outputs]
    weights = [weight.to(output.dtype) for weight, output in zip(weights, outputs, strict=True)]
    given = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    grads = torch.autograd.grad(outputs, list(given.values()), weights)
    results = {f'output{i}': output.detach() for i, output in enumerate(outputs)}
    results |= {f'grad {name}': grad for name, grad in zip(given, grads, strict=True)}
    return results, weights


def rounded(inputs: Mapping[str, Tensor | None], parameters: set[str], dtype: torch.dtype) -> dict[str, Tensor | None]:
    """Inputs in ``dtype``, and those named in ``parameters`` in the dtype that goes with it."""
    return {
        name: None if value is None else value.to(state_dtype(dtype) if name in parameters else dtype)
        for name, value in inputs.items()
    }


Results = dict[str, Tensor]


def three_ways(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    loop: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Mapping[str, Tensor | None],
    options: Mapping[str, Any],
) -> tuple[Results, Results, Results]:
    """Outputs and gradients of an op on the same inputs: compiled, by the PyTorch reference, and exact."""
    got, weights = differentiate(function, inputs, options)
    with cuda_ops.use_reference():
        reference, _ = differentiate(function, inputs, options, weights)
    wide = {name: None if value is None else value.double() for name, value in inputs.items()}
    exact, _ = differentiate(loop, wide, options, weights)
    return got, reference, exact


def check_against_loop(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    loop: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Mapping[str, Tensor | None],
    options: Mapping[str, Any],
    parameters: set[str],
    dtype: torch.dtype,
    cuda: bool = False,
) -> None:
    """Hold an op's outputs and all its gradients against the float64 loop.

    Args:
        function: the op's public function.
        loop: the plain loop with the same arguments.
        inputs: tensors by argument, in float64; None for one that is left out.
        options: the other arguments.
        parameters: names of the inputs that stay in float32 where the maps are of lower precision.
        dtype: the dtype of the maps.
        cuda: whether CUDA kernels serve the op, on a GPU or emulated.
    """
    got, reference, exact = three_ways(function, loop, rounded(inputs, parameters, dtype), options)
    for name, value in exact.items():
        assert_accurate(name, got[name], value, reference[name], dtype, cuda)


def run_python(code: str, *, path: Path = ROOT, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter, in a folder whose packages it finds, with one thread unless told otherwise."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith('SSM_OPS_')}
    variables |= {'PYTHONPATH': str(path), 'OMP_NUM_THREADS': '1', **environ}
    return subprocess.run(
        [sys.executable, '-c', code], env=variables, cwd=path, capture_output=True, text=True, timeout=300
    )
