"""Compatibility with PyTorch 2.1 and later: what newer versions call otherwise, or do not let one do at all.

No other module of ``cuda_ops`` uses a function that torch 2.1 does not have. Before torch 2.4, the transforms of
``torch.func`` and forward mode go through the scans as far as that version lets them; nothing of it is tested there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cuda_ops._build import parse_release, refusal_of

RELEASE = parse_release(torch.__version__)
if refusal := refusal_of(torch.__version__):
    raise ImportError(refusal)
# torch.cuda.OutOfMemoryError before torch 2.5.
OutOfMemoryError: type[RuntimeError] = getattr(torch, 'OutOfMemoryError', torch.cuda.OutOfMemoryError)
# A function of torch's own, which torch.compile takes for a constant.
is_compiling: Callable[[], bool] = (
    torch.compiler.is_compiling if hasattr(torch.compiler, 'is_compiling') else torch._utils.is_compiling
)
# Before torch 2.7 a program of torch.export is traced as anything else.
TELLS_EXPORTING = hasattr(torch.compiler, 'is_exporting')
is_exporting: Callable[[], bool] = torch.compiler.is_exporting if TELLS_EXPORTING else lambda: False
_ASKS_FOR_AUTOCAST_BY_DEVICE = hasattr(torch, 'get_autocast_dtype')


def is_intercepted() -> bool:
    """Return whether a transformation of ``torch.func`` or a ``TorchDispatchMode`` gets the operators."""
    return bool(torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack())


def register_fake(library: torch.library.Library, name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator that registers what gives the operator's shapes, as ``torch.library.register_fake`` of 2.4."""
    if hasattr(torch.library, 'register_fake'):
        return torch.library.register_fake(f'cuda_ops::{name}', lib=library)

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        library.impl(name, function, 'Meta')
        return function

    return register


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """Return the dtype that autocast has on 'cpu' or 'cuda', None where it is off."""
    if _ASKS_FOR_AUTOCAST_BY_DEVICE:
        return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
    if device_type == 'cpu':
        return torch.get_autocast_cpu_dtype() if torch.is_autocast_cpu_enabled() else None
    return torch.get_autocast_gpu_dtype() if torch.is_autocast_enabled() else None


def register_autograd_kernel(library: torch.library.Library, name: str, kernel: Callable[..., Any]) -> None:
    """Register ``kernel(keyset, *arguments)`` for the Autograd key; it goes on by :func:`call_below_autograd`."""
    if RELEASE >= (2, 4):
        library.impl(name, kernel, 'Autograd', with_keyset=True)
    else:
        library.impl(name, functools.partial(kernel, None), 'Autograd')


def call_below_autograd(operator: Any, keyset: Any, arguments: Sequence[Any]) -> tuple[Tensor, ...]:
    """Call the kernel of an operator that comes after that of the Autograd key."""
    with torch._C._AutoDispatchBelowAutograd():
        if keyset is None:
            return operator(*arguments)
        return operator.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)


def register_flop_formula(operator: Any, formula: Callable[..., int]) -> None:
    """Register an operator's FLOPs, from the shapes of its arguments, with ``torch.utils.flop_counter``."""
    from torch.utils import flop_counter

    if not hasattr(flop_counter, 'flop_registry'):
        flop_counter.flop_mapping[operator] = formula  # type: ignore[attr-defined]
        return
    # torch 2.4 registers the overloads alone, and then looks for the operator.
    flop_counter.flop_registry[operator] = flop_counter.register_flop_formula(operator)(formula)
