"""Random numbers that a resumed training draws as if it had not been interrupted."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner

_State = tuple[Any, Any, torch.Tensor]
_DATA, _MODEL = 0, 1


class ResumableRandomnessHook(Hook):
    """Hook that makes the random numbers of a training a function of its seed, process, epoch and iteration.

    mmengine saves no generator's state. Here the model's numbers (stochastic depth, dropout, samplers of detectors)
    are seeded anew for each iteration, and those of the data for each epoch; neither uses up the other's, nor
    does an evaluation. An iteration-based training has one epoch, whose data mmengine reads again on resuming.

    DataLoader workers are seeded by mmengine whenever they start. With ``persistent_workers`` in an epoch-based
    training they go on with the epoch before, so that a resumed one draws others.
    """

    # Before other hooks, which may draw numbers.
    priority = 'HIGHEST'

    def __init__(self) -> None:
        self._data: _State | None = None
        self._training: _State | None = None

    def before_train_epoch(self, runner: Runner) -> None:
        """Seed the data's numbers."""
        epoch = runner.epoch if getattr(runner.train_loop, 'max_epochs', 1) > 1 else 0
        _seed(runner, _DATA, epoch)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Seed the model's numbers; the batch has been read."""
        self._data = _state()
        _seed(runner, _MODEL, runner.iter)

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Go on with the data's numbers."""
        if self._data is not None:
            _restore(self._data)

    def before_val_epoch(self, runner: Runner) -> None:
        """Remember where the data's numbers are."""
        self._training = _state()

    def after_val_epoch(self, runner: Runner, metrics: Any = None) -> None:
        """Go on from there."""
        if self._training is not None:
            _restore(self._training)


def _seed(runner: Runner, stream: int, step: int) -> None:
    # SeedSequence mixes the numbers, so that neighbouring steps and processes share nothing.
    words = np.random.SeedSequence([runner.seed, runner.rank, stream, step]).generate_state(3)
    torch.manual_seed(int(words[0]))
    np.random.seed(int(words[1]))
    random.seed(int(words[2]))


def _state() -> _State:
    return random.getstate(), np.random.get_state(), torch.get_rng_state()


def _restore(state: _State) -> None:
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(state[2])
