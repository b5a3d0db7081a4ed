"""Results in float32 of models that validate and test under autocast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from mmengine.structures import BaseDataElement
from torch import Tensor, nn


def return_float32(model: nn.Module) -> None:
    """Make a model's ``val_step`` and ``test_step`` return float32 for bfloat16, which NumPy does not have."""
    for name in ('val_step', 'test_step'):
        setattr(model, name, _in_float32(getattr(model, name)))


def _in_float32(step: Callable[..., Any]) -> Callable[..., Any]:
    def step_in_float32(*args: Any, **kwargs: Any) -> Any:
        samples = step(*args, **kwargs)
        for sample in samples:
            _cast(sample)
        return samples

    return step_in_float32


def _cast(sample: Any) -> None:
    if not isinstance(sample, BaseDataElement):
        return
    for name, value in list(sample.items()):
        if isinstance(value, Tensor) and value.dtype == torch.bfloat16:
            setattr(sample, name, value.float())
        else:
            _cast(value)
