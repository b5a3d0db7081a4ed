"""Compatibility with PyTorch 2.4 and later.

No other module of the package uses a function that torch 2.4 does not have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

# torch.cuda.OutOfMemoryError before torch 2.5.
OutOfMemoryError: type[RuntimeError] = getattr(torch, 'OutOfMemoryError', torch.cuda.OutOfMemoryError)
_is_exporting: Callable[[], bool] | None = getattr(torch.compiler, 'is_exporting', None)


def is_exporting() -> bool:
    """Return whether ``torch.export`` is tracing the program, like ``torch.compiler.is_exporting`` of torch 2.7.

    Before 2.7, only a trace with ``strict=False`` can be distinguished from ``torch.compile``.
    """
    if _is_exporting is not None:
        return _is_exporting()
    return torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()


def allow_in_checkpoints(allowed: Mapping[str, Any]) -> None:
    """Allow classes and functions in ``torch.load(weights_only=True)`` permanently, under the given names.

    Since torch 2.6 they stay allowed when other code leaves a ``torch.serialization.safe_globals`` block that lists
    the same class.

    Args:
        allowed: Maps the full name in the file to the class or function that is used for it.
    """
    named: list[Any] = [(thing, name) for name, thing in allowed.items()]
    if _takes_names():
        torch.serialization.add_safe_globals(named)
    else:
        # torch 2.4 and 2.5 use the objects' own names; a single tuple in the list makes every later load fail.
        torch.serialization.add_safe_globals([_renamed(thing, name) for thing, name in named])


def set_recompile_limit(limit: int) -> None:
    """Set how many graphs ``torch.compile`` may compile for one function."""
    config = torch._dynamo.config
    setattr(config, 'recompile_limit' if hasattr(config, 'recompile_limit') else 'cache_size_limit', limit)


def release() -> tuple[int, int]:
    """Return the major and minor version of PyTorch."""
    major, minor = torch.__version__.split('.')[:2]
    return int(major), int(minor)


class Float32RMSNorm(nn.RMSNorm):
    """Compute ``RMSNorm`` in float32, as PyTorch's own does from 2.6 on.

    Before, the gradient of small float16 values is NaN: a power of the root overflows.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (..., C); the result has the dtype of x, or of the weight where that is wider."""
        normalised = nn.functional.rms_norm(x.float(), self.normalized_shape, None, self.eps).to(x.dtype)
        return normalised if self.weight is None else normalised * self.weight


RMSNorm: type[nn.RMSNorm] = nn.RMSNorm if release() >= (2, 6) else Float32RMSNorm


def _takes_names() -> bool:
    return release() >= (2, 6)


def _renamed(thing: Any, name: str) -> Any:
    module, _, short = name.rpartition('.')
    if (thing.__module__, thing.__name__) == (module, short):
        return thing
    if isinstance(thing, type):
        return type(short, (thing,), {'__module__': module})
    return _wrapper(thing, module, short)


def _wrapper(function: Callable[..., Any], module: str, short: str) -> Callable[..., Any]:
    def renamed(*args: Any) -> Any:
        return function(*args)

    renamed.__module__ = module
    renamed.__name__ = renamed.__qualname__ = short
    return renamed
