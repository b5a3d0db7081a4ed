"""Mixed precision in bfloat16, which needs no loss scaling and works on CPUs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from mmengine.runner import autocast


@OPTIM_WRAPPERS.register_module()
class BFloat16OptimWrapper(OptimWrapper):
    """An optimizer wrapper under whose context the model runs in bfloat16 autocast, on any device.

    mmengine's ``AmpOptimWrapper`` refuses CPUs. bfloat16 has float32's range, so gradients are neither scaled nor
    checked for overflow; parameters, gradients and the optimizer stay in float32. Takes ``OptimWrapper``'s arguments.
    """

    @contextmanager
    def optim_context(self, model: torch.nn.Module) -> Iterator[None]:
        """Autocast to bfloat16, beside the gradient accumulation context of ``OptimWrapper``."""
        with super().optim_context(model), autocast(dtype=torch.bfloat16):
            yield
