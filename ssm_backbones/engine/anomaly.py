"""Stop a training at the first value that is not finite, and say which module made it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ssm_backbones.utils.errors import CommandError


class NonFiniteValue(CommandError):
    """A training has computed NaN or infinity."""


class DetectAnomalyHook(Hook):
    """Hook that checks every module's outputs, every gradient, and every parameter and buffer after each iteration.

    The first value that is NaN or infinite raises :class:`NonFiniteValue` with the iteration and the module. A module
    is checked when it returns, so that the innermost one is named. Gradients are not checked where the loss is scaled
    (float16): there the scaler skips iterations whose gradients overflow. Buffers that have infinity before the
    training may keep it.

    Each check waits for the device, so that a training takes longer with it.
    """

    # After the hook of the random numbers, before all others.
    priority = 'VERY_HIGH'

    def __init__(self) -> None:
        self._iteration: int | None = None
        self._handles: list[Any] = []
        # Names of buffers that have infinity from the start, such as masks of attention.
        self._constants: set[str] = set()
        # Modules by the tensor that they are given, if another module has made it.
        self._readers = WeakTensorKeyDictionary()

    def before_train(self, runner: Runner) -> None:
        """Watch the model's modules and parameters."""
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        wrapper = runner.optim_wrapper
        # Several wrappers are a mapping of them.
        parts = [part for _, part in wrapper.items()] if hasattr(wrapper, 'items') else [wrapper]
        gradients = not any(hasattr(part, 'loss_scaler') for part in parts)
        self._constants = {name for name, value in runner.model.named_buffers() if _kind(value) == 'infinity'}
        if not gradients:
            runner.logger.info('gradients are not checked for NaN and infinity: the loss is scaled.')
        for name, module in model.named_modules():
            check = partial(self._check_module, name or 'the whole model', gradients)
            self._handles.append(module.register_forward_hook(check))
        for name, parameter in model.named_parameters():
            if gradients and parameter.requires_grad:
                self._handles.append(parameter.register_hook(self._gradient_check(f'parameter {name}')))

    def after_train(self, runner: Runner) -> None:
        """Watch them no longer."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Begin to check."""
        self._iteration = runner.iter + 1

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Check parameters and buffers; an evaluation that may follow is not checked."""
        for kind, values in (
            ('parameter', runner.model.named_parameters()),
            ('buffer', runner.model.named_buffers()),
        ):
            for name, value in values:
                if name not in self._constants and _kind(value):
                    name = name.removeprefix('module.') if is_model_wrapper(runner.model) else name
                    self._stop(f'{kind} {name} has {_kind(value)} after the optimizer step')
        self._iteration = None

    def _check_module(self, name: str, gradients: bool, module: nn.Module, inputs: Any, outputs: Any) -> None:
        if self._iteration is None:
            return
        label = f'{name} ({type(module).__name__})'
        for _, value in _tensors(inputs):
            if value in self._readers:
                self._readers[value].append(label)
        for place, value in _tensors(outputs):
            kind = _kind(value)
            if kind:
                before = next(filter(None, (_kind(given) for _, given in _tensors(inputs))), None)
                origin = f'there is {before} in its inputs already' if before else 'its inputs are finite'
                self._stop(f'the output{place} of {label}, {tuple(value.shape)} {value.dtype}, has {kind}; {origin}')
            # A module may return its input, or a parameter, whose gradient is checked already.
            if gradients and value.grad_fn is not None and value not in self._readers:
                readers: list[str] = []
                self._readers[value] = readers
                value.register_hook(self._gradient_check(f'the output{place} of {label}', readers))

    def _gradient_check(self, what: str, readers: Sequence[str] = ()) -> Callable[[Tensor], None]:
        def check(gradient: Tensor) -> None:
            if self._iteration is not None and _kind(gradient):
                made = f', made by a module that reads it: {", ".join(readers)}' if readers else ''
                self._stop(f'the gradient of {what} has {_kind(gradient)}{made}')

        return check

    def _stop(self, what: str) -> None:
        raise NonFiniteValue(f'iteration {self._iteration}: {what}.')


def _kind(value: Tensor) -> str | None:
    """Say which non-finite values a tensor has, or return None."""
    if not (value.is_floating_point() or value.is_complex()):
        return None
    value = value.detach()
    if bool(torch.isfinite(value).all()):
        return None
    return 'NaN' if bool(torch.isnan(value).any()) else 'infinity'


def _tensors(value: Any, place: str = '') -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in nested containers with their places, as ``['loss']`` or ``[0]``."""
    if isinstance(value, Tensor):
        yield place, value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _tensors(part, f'{place}[{key!r}]')
    elif isinstance(value, (list, tuple)):
        for index, part in enumerate(value):
            yield from _tensors(part, f'{place}[{index}]')
