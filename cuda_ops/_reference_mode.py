"""Let PyTorch operations serve the scans, which have derivatives of any order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_FUNCTIONS: dict[Any, Callable[..., Any]] = {}


def serve(name: str, function: Callable[..., Any]) -> None:
    """Let ``function`` serve the operator ``cuda_ops::name`` within :func:`use_reference`."""
    operator = getattr(torch.ops.cuda_ops, name)
    _FUNCTIONS[operator] = _FUNCTIONS[operator.default] = function


class _ReferenceMode(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _FUNCTIONS.get(func, func)(*args, **(kwargs or {}))


def use_reference() -> AbstractContextManager[Any]:
    """Compute the scans by plain PyTorch operations within a ``with`` block, on any device.

    These are the recurrences of the documented equations, whatever is compiled. Gradients of any order, forward mode
    and every transform of ``torch.func`` go through them::

        with cuda_ops.use_reference():
            y = cuda_ops.line_scan(x, delta, A, B, C, axis='row')
            grad, = torch.autograd.grad(y.sum(), x, create_graph=True)
            grad.square().sum().backward()

    What is called within the block is what counts; a backward pass may follow outside, unless it calls scans again, as
    that of activation checkpointing does. The states of every position are stored, (B, H * W, E, N) for each route:
    this is for small maps, tests and derivatives that the compiled scans do not have. The block holds for the thread
    that it is entered in.
    """
    return _ReferenceMode()
