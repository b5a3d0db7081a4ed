"""Compatibility with PyTorch 2.1 and later.

No other module of the package uses a function that torch 2.1 does not have; ``cuda_ops`` has a module of its own. ONNX
export alone needs torch 2.6, and says so.
"""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from cuda_ops._torch_compat import RELEASE, OutOfMemoryError, is_compiling, is_intercepted

__all__ = ['HAS_FUSED_ADAMW', 'OutOfMemoryError', 'RMSNorm', 'is_compiling', 'is_intercepted', 'release']
_LISTS_GLOBALS = hasattr(torch.serialization, 'add_safe_globals')
# What allow_in_checkpoints allowed; torch keeps no list of its own before 2.4.
_ALLOWED: dict[str, Any] = {}
HAS_FUSED_ADAMW = RELEASE >= (2, 4)
"""Whether AdamW's ``fused=True`` works on CPUs: one pass over a parameter in place of eight."""
# oneDNN's derivative of GELU, as torch 2.1 calls it, takes a gradient for contiguous, whatever its strides.
_GELU_NEEDS_CONTIGUOUS = RELEASE < (2, 2)
_is_exporting: Callable[[], bool] | None = getattr(torch.compiler, 'is_exporting', None)
_has_any_global_hook: Callable[[], bool] | None = getattr(torch_module, '_has_any_global_hook', None)


def is_exporting() -> bool:
    """Return whether ``torch.export`` is tracing the program, like ``torch.compiler.is_exporting`` of torch 2.7.

    Before 2.7, only a trace with ``strict=False`` can be distinguished from ``torch.compile``, and before 2.3 none.
    """
    if _is_exporting is not None:
        return _is_exporting()
    if not hasattr(torch.compiler, 'is_dynamo_compiling'):
        return False
    return is_compiling() and not torch.compiler.is_dynamo_compiling()


def allow_in_checkpoints(allowed: Mapping[str, Any]) -> None:
    """Allow classes and functions in ``torch.load(weights_only=True)`` permanently, under the given names.

    Before torch 2.4, which takes none, :func:`torch_load_weights` alone allows them. Since torch 2.6 they stay allowed
    when other code leaves a ``torch.serialization.safe_globals`` block that lists the same class.

    Args:
        allowed: Maps the full name in the file to the class or function that is used for it.
    """
    _ALLOWED.update(allowed)
    if not _LISTS_GLOBALS:
        return
    named: list[Any] = [(thing, name) for name, thing in allowed.items()]
    if _takes_names():
        torch.serialization.add_safe_globals(named)
    else:
        # torch 2.4 and 2.5 use the objects' own names; a single tuple in the list makes every later load fail.
        torch.serialization.add_safe_globals([_renamed(thing, name) for thing, name in named])


def allowed_in_checkpoints() -> set[str]:
    """Return the names of what was allowed in checkpoints, by this package or by others."""
    if not _LISTS_GLOBALS:
        return set(_ALLOWED)
    return {
        entry[1] if isinstance(entry, tuple) else f'{entry.__module__}.{entry.__qualname__}'
        for entry in torch.serialization.get_safe_globals()
    }


def load_weights(path: str | os.PathLike[str]) -> Any:
    """Read a checkpoint onto the CPU by ``torch.load(weights_only=True)``, or what serves for it before torch 2.6.

    Raises:
        pickle.UnpicklingError: If it holds more than tensors, plain values and what was allowed.
        Exception: Whatever damaged bytes raise.
    """
    with open(path, 'rb') as stream:
        is_program = zipfile.is_zipfile(stream) and 'constants.pkl' in {
            name.rpartition('/')[2] for name in zipfile.ZipFile(stream).namelist()
        }
    if is_program:
        raise RuntimeError('it is a TorchScript archive, which holds a program')
    return torch_load_weights(path, map_location='cpu')


def torch_load_weights(file: Any, **options: Any) -> Any:
    """Call ``torch.load(weights_only=True)``, or what serves for it before torch 2.6.

    Args:
        file: As of ``torch.load``.
        options: Likewise; ``pickle_module`` and ``weights_only`` among them have no effect.
    """
    if release() >= (2, 6):
        return torch.load(file, **(options | {'weights_only': True, 'pickle_module': None}))
    return torch.load(file, **(options | {'weights_only': False, 'pickle_module': _WeightsOnly('weights_only')}))


class _Refused(pickle.UnpicklingError):
    """A checkpoint asks for what is not allowed; other errors of that class are those of damaged files."""


class _Unpickler(pickle.Unpickler):
    """Finds what ``weights_only=True`` of torch 2.1 to 2.5 finds, and what was allowed.

    Those versions know too few classes, or take damaged files for refused ones.
    """

    def find_class(self, module: str, name: str) -> Any:
        from torch import _weights_only_unpickler as torch_s

        # torch writes pickles of protocol 2, in which built-in functions have Python 2's module.
        module = 'builtins' if module == '__builtin__' else module
        # The users' own are listed from torch 2.4 on.
        of_users: dict[str, Any] = getattr(torch_s, '_get_user_allowed_globals', dict)()
        known = _ALLOWED | of_users | torch_s._get_allowed_globals()
        if f'{module}.{name}' not in known:
            raise _Refused(f'unsupported global: {module}.{name}')
        return known[f'{module}.{name}']

    def load(self) -> Any:
        try:
            return super().load()
        except _Refused:
            raise
        except pickle.UnpicklingError as error:
            raise EOFError(str(error)) from error


class _WeightsOnly(ModuleType):
    """Stands for the module ``pickle`` in ``torch.load``."""

    Unpickler = _Unpickler

    @staticmethod
    def load(file: Any, **options: Any) -> Any:
        return _Unpickler(file, **options).load()


def set_recompile_limit(limit: int) -> None:
    """Set how many graphs ``torch.compile`` may compile for one function."""
    config = torch._dynamo.config
    setattr(config, 'recompile_limit' if hasattr(config, 'recompile_limit') else 'cache_size_limit', limit)


def has_any_global_hook() -> bool:
    """Return whether a hook for all modules is set."""
    if _has_any_global_hook is not None:
        return _has_any_global_hook()
    kinds = ('forward', 'forward_pre', 'backward', 'backward_pre')
    return any(getattr(torch_module, f'_global_{kind}_hooks') for kind in kinds)


def release() -> tuple[int, int]:
    """Return the major and minor version of PyTorch."""
    return RELEASE


class _LastDimensionNorm(nn.Module):
    """What of ``nn.RMSNorm``, which came with torch 2.4, the backbones use: the parameter and the arguments."""

    def __init__(self, normalized_shape: int, eps: float, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.normalized_shape = (normalized_shape,)
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(normalized_shape, device=device, dtype=dtype))


AnyRMSNorm: type[Any] = getattr(nn, 'RMSNorm', _LastDimensionNorm)


class Float32RMSNorm(AnyRMSNorm):
    """Compute ``RMSNorm`` in float32, as PyTorch's own does from 2.6 on.

    Before, the gradient of small float16 values is NaN: a power of the root overflows.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (..., C); the result has the dtype of x, or of the weight where that is wider."""
        values = x.float()
        normalised = (values * torch.rsqrt(values.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)
        return normalised if self.weight is None else normalised * self.weight


RMSNorm: type[Any] = nn.RMSNorm if release() >= (2, 6) else Float32RMSNorm


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


def keep_gradient_contiguous(x: Tensor) -> None:
    """Have the gradient of a map, which a convolution gives in another layout, copied for the function that made it.

    Torch 2.1 computes the gradient of GELU wrongly on CPUs without that; since 2.2 this does nothing.
    """
    # A proxy of torch.fx is no tensor.
    if _GELU_NEEDS_CONTIGUOUS and isinstance(x, Tensor) and x.requires_grad and x.device.type == 'cpu':
        x.register_hook(Tensor.contiguous)
