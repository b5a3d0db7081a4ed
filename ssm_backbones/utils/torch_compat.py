"""What the package uses of newer versions of PyTorch, for all from 2.4 on.

Nothing else in the package names a function that torch 2.4 has not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

# torch 2.5 gave the error, which torch.cuda had before, its general name.
OutOfMemoryError: type[RuntimeError] = getattr(torch, 'OutOfMemoryError', torch.cuda.OutOfMemoryError)
_is_exporting: Callable[[], bool] | None = getattr(torch.compiler, 'is_exporting', None)


def is_exporting() -> bool:
    """Whether ``torch.export`` traces the program, as ``torch.compiler.is_exporting`` of torch 2.7 says.

    Before, only a trace with ``strict=False`` is told from ``torch.compile``.
    """
    if _is_exporting is not None:
        return _is_exporting()
    return torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()


def allow_in_checkpoints(allowed: Mapping[str, Any]) -> None:
    """Let ``torch.load(weights_only=True)`` find these classes and functions by these names, from now on.

    Since torch 2.6 they stay allowed where other code ends a ``torch.serialization.safe_globals`` block that lists the
    same class.

    Args:
        allowed: by the full name that is in the file, what to take it for.
    """
    named: list[Any] = [(thing, name) for name, thing in allowed.items()]
    if _takes_names():
        torch.serialization.add_safe_globals(named)
    else:
        # They go by their own names there, and a single tuple makes every later reading fail.
        torch.serialization.add_safe_globals([_renamed(thing, name) for thing, name in named])


def set_recompile_limit(limit: int) -> None:
    """Let ``torch.compile`` make up to this many graphs of a function."""
    config = torch._dynamo.config
    setattr(config, 'recompile_limit' if hasattr(config, 'recompile_limit') else 'cache_size_limit', limit)


def _takes_names() -> bool:
    return release() >= (2, 6)


def release() -> tuple[int, int]:
    """Major and minor version of PyTorch."""
    major, minor = torch.__version__.split('.')[:2]
    return int(major), int(minor)


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
