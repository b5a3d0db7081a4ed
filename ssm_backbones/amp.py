"""Mixed precision in bfloat16, which needs no loss scaling and works on CPUs."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from mmengine.runner import autocast
from torch import Tensor


@OPTIM_WRAPPERS.register_module()
class BFloat16OptimWrapper(OptimWrapper):
    """An optimizer wrapper under whose context the model runs in bfloat16 autocast, on any device.

    mmengine's ``AmpOptimWrapper`` refuses CPUs. bfloat16 has float32's range, so gradients are neither scaled nor
    checked for overflow; parameters, gradients and the optimizer stay in float32. mmcv's RoIAlign and non-maximum
    suppression, which know no bfloat16, are made to compute in float32. Takes ``OptimWrapper``'s arguments.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if 'mmcv.ops' in sys.modules:
            _let_mmcv_take_bfloat16()

    @contextmanager
    def optim_context(self, model: torch.nn.Module) -> Iterator[None]:
        """Autocast to bfloat16, beside the gradient accumulation context of ``OptimWrapper``."""
        with super().optim_context(model), autocast(dtype=torch.bfloat16):
            yield


@functools.cache
def _let_mmcv_take_bfloat16() -> None:
    from mmcv.ops import RoIAlign
    from mmcv.ops.nms import NMSop

    RoIAlign.forward = _in_float32(RoIAlign.forward)
    NMSop.forward = staticmethod(_in_float32(NMSop.forward))


def _in_float32(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def computed_in_float32(*args: Any) -> Any:
        if not any(isinstance(arg, Tensor) and arg.dtype == torch.bfloat16 for arg in args):
            return function(*args)
        out = function(*(arg.float() if isinstance(arg, Tensor) and arg.is_floating_point() else arg for arg in args))
        return out.bfloat16() if out.is_floating_point() else out

    return computed_in_float32
