"""Trainings that stop at the first value that is not finite."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ssm_backbones.engine.anomaly import DetectAnomalyHook, NonFiniteValue


class Root(nn.Module):
    """sqrt(x - low): NaN below it, and an infinite gradient at it."""

    def __init__(self, low: float) -> None:
        super().__init__()
        self.low = low

    def forward(self, x):
        return (x - self.low).sqrt()


class Model(nn.Module):
    def __init__(self, low: float) -> None:
        super().__init__()
        self.stem = nn.Linear(2, 2, bias=False)
        nn.init.eye_(self.stem.weight)
        self.stages = nn.Sequential(nn.Identity(), nn.Sequential(Root(low), nn.ReLU()))

    def forward(self, x):
        return {'loss': self.stages(self.stem(x)).sum()}


def one_iteration(model: nn.Module, x: torch.Tensor, **optim_wrapper) -> DetectAnomalyHook:
    hook, logged = DetectAnomalyHook(), []
    runner = SimpleNamespace(
        model=model, iter=6, optim_wrapper=SimpleNamespace(**optim_wrapper), logger=SimpleNamespace(info=logged.append)
    )
    hook.before_train(runner)
    hook.before_train_iter(runner, 0)
    model(x)['loss'].backward()
    hook.after_train_iter(runner, 0)
    assert bool(logged) == bool(optim_wrapper)
    hook.after_train(runner)
    return hook


def test_the_first_module_with_a_bad_output_is_named() -> None:
    one_iteration(Model(low=-1.0), torch.ones(1, 2))
    message = r'iteration 7: the output of stages.1.0 \(Root\), \(1, 2\) torch.float32, has NaN; its inputs are'
    with pytest.raises(NonFiniteValue, match=message):
        one_iteration(Model(low=2.0), torch.ones(1, 2))
    with pytest.raises(NonFiniteValue, match=r'the output of stem .* has NaN; there is infinity in its inputs'):
        one_iteration(Model(low=-1.0), torch.tensor([[math.inf, 1.0]]))


def test_the_first_bad_gradient_is_named() -> None:
    message = r'iteration 7: the gradient of the output of stem .* has NaN, made by .* stages.1.0 \(Root\)'
    with pytest.raises(NonFiniteValue, match=message):
        one_iteration(Model(low=1.0), torch.ones(1, 2))
    # Where a scaler looks after gradients they may overflow.
    one_iteration(Model(low=1.0), torch.ones(1, 2), loss_scaler=None)
    several = dict(items=lambda: [('generator', SimpleNamespace(loss_scaler=None))])
    one_iteration(Model(low=1.0), torch.ones(1, 2), **several)


def test_bad_parameters_and_buffers_are_named() -> None:
    model = Model(low=-1.0)
    model.register_buffer('mean', torch.tensor(math.nan))
    with pytest.raises(NonFiniteValue, match='iteration 7: buffer mean has NaN after the optimizer step'):
        one_iteration(model, torch.ones(1, 2))


def test_what_is_infinite_from_the_start_may_stay() -> None:
    model = Model(low=-1.0)
    model.register_buffer('attention_mask', torch.tensor([0.0, -math.inf]))
    one_iteration(model, torch.ones(1, 2))


def test_a_parameter_that_is_returned_is_not_noted_again() -> None:
    class Position(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.value = nn.Parameter(torch.ones(2))

        def forward(self):
            return self.value

    position = Position()
    hook = DetectAnomalyHook()
    hook._iteration = 1
    hook._check_module('position', True, position, (), position())
    assert not hook._readers


def test_modules_are_not_checked_after_the_iteration() -> None:
    model = Model(low=-1.0)
    one_iteration(model, torch.ones(1, 2))
    assert model(torch.full((1, 2), math.nan))['loss'].isnan()


def test_a_training_that_diverges_stops(train, write_config, tmp_path) -> None:
    config = write_config('mmpretrain', 'optim_wrapper = dict(optimizer=dict(lr=float("inf")))')
    with pytest.raises(NonFiniteValue, match='iteration 1: parameter backbone.*after the optimizer step'):
        train(config, tmp_path / 'work', detect_anomaly=True)
