"""Checks of a checkpoint that a training is resumed from, against the optimizer and the schedules of the config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner

from ssm_backbones.checkpoints.files import CheckpointError
from ssm_backbones.engine.optim import GroupedOptimWrapperConstructor


class CheckResumedHook(Hook):
    """Hook that compares what a training is resumed from with the config.

    mmengine restores a scheduler with the end that it was saved with: after a change of the batch size or of the
    number of epochs, learning rates follow the former schedule. That is logged. Parameters that the optimizer groups in
    another way are refused.

    Args:
        source: The checkpoint's name, for messages.
    """

    def __init__(self, source: str) -> None:
        self.source = source

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Compare the optimizer's and the schedulers' states.

        Raises:
            CheckpointError: If the optimizer's parameters are grouped in another way.
        """
        _check_optimizer(runner, checkpoint.get('optimizer'), self.source)
        _compare_schedules(runner, checkpoint, self.source)


def _compare_schedules(runner: Runner, checkpoint: Mapping[str, Any], source: str) -> None:
    before = _batch_size(checkpoint)
    now = runner.train_dataloader.batch_size
    for saved, scheduler in _schedules(runner, checkpoint.get('param_schedulers')):
        if saved.get('end') != scheduler.end and not scheduler.by_epoch:
            runner.logger.warning(
                f'{source}: {type(scheduler).__name__} goes on to iteration {saved.get("end")}, as it was saved, not '
                f'to {scheduler.end}, as the config says (batch size {before} before, {now} now): the learning rates '
                'are those of the former schedule. To follow the new one, start from the weights, by load_from, '
                'without resuming.'
            )
    if before not in (None, now):
        runner.logger.warning(
            f'{source}: the batch size was {before} and is {now} now; the learning rate is not changed for it.'
        )


def _check_optimizer(runner: Runner, saved: Any, source: str) -> None:
    state = runner.optim_wrapper.state_dict()
    if not isinstance(saved, Mapping) or 'param_groups' not in saved or 'param_groups' not in state:
        return
    both = (saved['param_groups'], state['param_groups'])
    before, now = ([len(group['params']) for group in groups] for groups in both)
    former, current = ([group.get('param_names') for group in groups] for groups in both)
    # Groups of equal sizes may have other members, which only their names tell, where both have them.
    renamed = None not in former + current and former != current
    if before == now and not renamed:
        return
    if sum(before) == sum(now) == len(before) and _constructor(runner) == GroupedOptimWrapperConstructor.__name__:
        remedy = (
            'It has one for each parameter, as configs of 0.1 had: add --cfg-options '
            'optim_wrapper.constructor=DefaultOptimWrapperConstructor to go on, or'
        )
    else:
        remedy = (
            'Other frozen_stages, another constructor, or another paramwise_cfg group them differently: go on with the '
            'former settings, or'
        )
    raise CheckpointError(
        f'{source} cannot be resumed from: its optimizer has {sum(before)} parameters in {len(before)} groups, this '
        f"config's {sum(now)} in {len(now)}{', of other members' if before == now else ''}. {remedy} start from the "
        'weights, by load_from, without resuming.'
    )


def _constructor(runner: Runner) -> str | None:
    return (runner.cfg.get('optim_wrapper') or {}).get('constructor')


def _schedules(runner: Runner, saved: Any) -> list[tuple[Mapping[str, Any], Any]]:
    schedulers = runner.param_schedulers
    if not isinstance(saved, list) or not isinstance(schedulers, list) or len(saved) != len(schedulers):
        return []
    return list(zip(saved, schedulers, strict=True))


def _batch_size(checkpoint: Mapping[str, Any]) -> int | None:
    text = (checkpoint.get('meta') or {}).get('cfg')
    if not isinstance(text, str):
        return None
    try:
        loader = Config.fromstring(text, file_format='.py').get('train_dataloader') or {}
    except Exception:
        # Nothing depends on the former config but a line of the log.
        return None
    return loader.get('batch_size')
