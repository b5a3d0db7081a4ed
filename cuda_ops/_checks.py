"""Checks of what users pass to the public functions, with messages that name the offending value and the remedy."""

from typing import Any

import torch
from torch import Tensor

from cuda_ops._torch_compat import autocast_dtype, is_compiling, is_intercepted

_CAST_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_DTYPES = (*_CAST_DTYPES, torch.float64)


def tensors(**values: object) -> None:
    """Raise TypeError unless each value is a tensor."""
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise TypeError(f'{name} must be a tensor, got {type(value).__name__}')


def tensors_or_none(**values: object) -> None:
    """Raise TypeError unless each value is a tensor or None."""
    for name, value in values.items():
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f'{name} must be a tensor or None, got {type(value).__name__}')


def ndim(name: str, value: Tensor, dims: int, meaning: str) -> None:
    """Raise ValueError unless ``value`` has ``dims`` dimensions."""
    if value.dim() != dims:
        raise ValueError(f'{name} must have {dims} dimensions {meaning}, got shape {tuple(value.shape)}')


def shape(name: str, value: Tensor | None, expected: tuple[int, ...], meaning: str) -> None:
    """Raise ValueError unless ``value`` is None or has the expected shape."""
    if value is not None and value.shape != expected:
        raise ValueError(f'{name} must have shape {tuple(expected)}, which is {meaning}, got {tuple(value.shape)}')


def grid(x: Tensor) -> None:
    """Raise ValueError unless the map (B, H, W, E) has at least one pixel."""
    if x.shape[1] < 1 or x.shape[2] < 1:
        raise ValueError(f'x must have height and width of at least 1, got shape {tuple(x.shape)}')


def states(A: Tensor, name: str = 'A') -> None:
    """Raise ValueError unless the decay rates (..., N) are those of at least one state."""
    if A.shape[-1] < 1:
        raise ValueError(f'{name} must hold at least one state for each channel, got shape {tuple(A.shape)}')


def rank(delta_weight: Tensor) -> None:
    """Raise ValueError unless delta_weight (..., E, R) has a dt_rank R of at least 1."""
    if delta_weight.shape[-1] < 1:
        raise ValueError(f'delta_weight must have a dt_rank of at least 1, got shape {tuple(delta_weight.shape)}')


def same_dtype_and_device(**tensors: Tensor | None) -> None:
    """Raise TypeError or ValueError unless all tensors share a supported floating dtype and a device."""
    given = [(name, value) for name, value in tensors.items() if value is not None]
    first_name, first = given[0]
    if first.dtype not in _DTYPES:
        raise TypeError(f'{first_name} must be float32, bfloat16, float16 or float64, got {first.dtype}')
    if first.dtype == torch.float64 and first.device.type == 'cuda':
        raise TypeError(f'{first_name} is float64, which the scans serve on CPU alone; use float32 on {first.device}')
    for name, value in given[1:]:
        if value.dtype != first.dtype:
            raise TypeError(
                f'{name} must have the dtype of {first_name}, {first.dtype}, got {value.dtype}; '
                f'convert it with {name}.to({first.dtype})'
            )
    same_device(first, **dict(given[1:]))


def same_device(first: Tensor, **tensors: Tensor | None) -> None:
    """Raise TypeError or ValueError unless each given tensor is floating and on the first one's device."""
    for name, value in tensors.items():
        if value is None:
            continue
        if not value.is_floating_point():
            raise TypeError(f'{name} must be a floating tensor, got {value.dtype}')
        if value.device != first.device:
            raise ValueError(
                f'{name} is on {value.device}, the map is on {first.device}; '
                f'move it with {name}.to({str(first.device)!r})'
            )


def autocast(*tensors: Any) -> tuple[Any, ...]:
    """Under autocast, cast float tensors to its dtype as matrix products do; float64 stays as it is."""
    device_type = tensors[0].device.type
    # Asking is an error for a device without autocast, such as meta; and torch.compile cannot ask which have it before
    # torch 2.7.
    dtype = autocast_dtype(device_type) if device_type in ('cpu', 'cuda') else None
    if dtype is None:
        return tensors
    return tuple(value.to(dtype) if value is not None and value.dtype in _CAST_DTYPES else value for value in tensors)


def decay_rates(A: Tensor, name: str = 'A') -> None:
    """Raise ValueError if rates are positive or not finite; on other devices than the CPU reading it would stall.

    Where values may not be known, while something traces operations or maps over them, nothing is checked.
    """
    if A.device.type != 'cpu' or not A.numel() or is_compiling() or is_intercepted():
        return
    wrong = ~(torch.isfinite(A) & (A <= 0))
    if wrong.any():
        value = A[wrong][0].item()
        raise ValueError(
            f'{name} must be finite and not positive, got {value}; {name} is usually minus the '
            'exponential of a parameter, and a NaN there means that training has diverged'
        )
