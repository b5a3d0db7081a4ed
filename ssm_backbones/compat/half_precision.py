"""Let mmcv's operators and the heads' losses take bfloat16 and float16."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

_MMCV_FUNCTIONS = (
    ('carafe', 'CARAFEFunction'),
    ('carafe', 'CARAFENaiveFunction'),
    ('deform_conv', 'DeformConv2dFunction'),
    ('focal_loss', 'SigmoidFocalLossFunction'),
    ('focal_loss', 'SoftmaxFocalLossFunction'),
    ('modulated_deform_conv', 'ModulatedDeformConv2dFunction'),
    ('multi_scale_deform_attn', 'MultiScaleDeformableAttnFunction'),
    ('nms', 'NMSop'),
    ('nms', 'SoftNMSop'),
    ('roi_align', 'RoIAlignFunction'),
    ('roi_pool', 'RoIPoolFunction'),
)


@functools.cache
def let_mmcv_take_bfloat16() -> None:
    """Make mmcv's operators, which do not support bfloat16, nor float16 on CPUs, compute such inputs in float32."""
    for name, function in _MMCV_FUNCTIONS:
        function = getattr(importlib.import_module(f'mmcv.ops.{name}'), function)
        function.forward = staticmethod(_in_float32(function.forward))
        # The backward pass gets what the forward pass stored, in float32; autograd casts the gradients that it returns.
        function.backward = staticmethod(_in_float32(function.backward, out_too=False))


def _in_float32(function: Callable[..., Any], out_too: bool = True) -> Callable[..., Any]:
    @functools.wraps(function)
    def computed_in_float32(*args: Any) -> Any:
        dtype = next((arg.dtype for arg in args if _is_unsupported(arg)), None)
        if dtype is None:
            return function(*args)
        out = function(*(arg.float() if isinstance(arg, Tensor) and arg.is_floating_point() else arg for arg in args))
        if not out_too:
            return out
        return tuple(_to(part, dtype) for part in out) if isinstance(out, tuple) else _to(out, dtype)

    return computed_in_float32


def _is_unsupported(value: Any) -> bool:
    if not isinstance(value, Tensor):
        return False
    return value.dtype == torch.bfloat16 or (value.dtype == torch.float16 and not value.is_cuda)


def _to(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def let_losses_take_bfloat16(model: nn.Module) -> None:
    """Make a model's heads compute their losses in float32, without autocast, from outputs in bfloat16.

    The losses of some heads, such as mmdet's VFNet's, mix both types and stop.
    """
    for kind in {type(module) for module in model.modules()}:
        owner = next((base for base in kind.__mro__ if 'loss_by_feat' in vars(base)), None)
        if owner is not None:
            _patch_loss(owner)


@functools.cache
def _patch_loss(owner: Any) -> None:
    original = owner.loss_by_feat

    @functools.wraps(original)
    def loss_in_float32(self: Any, *args: Any, **kwargs: Any) -> Any:
        held = [tensor for tensor in _tensors((args, tuple(kwargs.values()))) if tensor.dtype == torch.bfloat16]
        if not held:
            return original(self, *args, **kwargs)
        kwargs = {name: _bfloat16_to_float32(value) for name, value in kwargs.items()}
        with torch.autocast(held[0].device.type, enabled=False):
            return original(self, *_bfloat16_to_float32(args), **kwargs)

    owner.loss_by_feat = loss_in_float32


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _bfloat16_to_float32(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float() if value.dtype == torch.bfloat16 else value
    # Named tuples and other kinds of sequence are left as they are.
    return type(value)(map(_bfloat16_to_float32, value)) if type(value) in (list, tuple) else value
