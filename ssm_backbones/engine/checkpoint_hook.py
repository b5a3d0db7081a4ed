"""Whole checkpoints on their way into a runner: the authors' are converted, and what does not fit is refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmengine.hooks import Hook
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.runner import Runner
from torch import nn

from ssm_backbones.backbones.base import SSMBackbone
from ssm_backbones.checkpoints.convert import convert_checkpoint
from ssm_backbones.checkpoints.differences import OUTPUT, Mismatch, explain, fit
from ssm_backbones.checkpoints.files import CheckpointError
from ssm_backbones.checkpoints.identify import CLASSIFIER, FAMILIES
from ssm_backbones.checkpoints.loading import returns_last_stage_alone
from ssm_backbones.checkpoints.locate import holds_official, own_weights, without_wrappers

# The normalisation of images, which the config gives, and averages that mmdet 2's hook kept among the weights.
_BESIDE = ('data_preprocessor.', 'ema_')


class LoadCheckpointHook(Hook):
    """Converts the authors' checkpoints as a runner loads them, and refuses those that do not fit its model.

    mmengine itself loads what a file and the model have in common and passes over the rest, so that a foreign file
    leaves the model as it was initialised.

    Args:
        source: The file's name, for messages.
        whole: Whether the whole model has to be in the file, as for a test; for fine-tuning the backbone has to.
        unused: Beginnings of names that may be in the file or the model alone.
        convert: Whether the authors' checkpoints are converted, and position embeddings resized; they are nothing that
            a training could go on from.
    """

    # Before all others, such as EMAHook, which take the weights from the checkpoint too.
    priority = 'VERY_HIGH'

    def __init__(self, source: str, whole: bool, unused: Sequence[str] = (), convert: bool = True) -> None:
        self.source = source
        self.whole = whole
        self.unused = (*_BESIDE, *unused)
        self.convert = convert

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Convert the checkpoint in place, and check it against the runner's model.

        Raises:
            CheckpointError: Naming the first tensors that are missing, not expected or of another shape.
        """
        model = runner.model
        while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
            model = model.module
        backbone = getattr(model, 'backbone', None)
        if self.convert and holds_official(checkpoint, FAMILIES):
            self._convert(checkpoint, backbone, runner)
        held = own_weights(checkpoint)
        tensors = without_wrappers(held, model.state_dict(), self.source)
        weights = {name: tensor for name, tensor in tensors.items() if not name.startswith(self.unused)}
        if self.whole:
            found = fit(model, weights, resize=self.convert)
            mismatches = [mismatch for mismatch in found.mismatches if not mismatch.name.startswith(self.unused)]
            self._refuse(mismatches, 'model', 'Name the checkpoint that was trained with this config.')
        elif isinstance(backbone, nn.Module):
            inside = {
                name.removeprefix('backbone.'): tensor
                for name, tensor in weights.items()
                if name.startswith('backbone.')
            }
            found = fit(backbone, inside, resize=self.convert)
            mismatches = [mismatch for mismatch in found.mismatches if not _is_foreign_output(mismatch, backbone)]
            self._refuse(
                mismatches,
                'backbone',
                'Name a checkpoint of a model with this backbone; a bare backbone '
                "is loaded by model.backbone.init_cfg=dict(type='Pretrained', checkpoint=...).",
                'backbone.',
            )
            found = found._replace(tensors={f'backbone.{name}': tensor for name, tensor in found.tensors.items()})
        else:
            return
        # Where the runner and its other hooks look for them, with position embeddings as they were resized.
        if tensors.keys() == held.keys() and isinstance(checkpoint.get('state_dict'), dict):
            # It also holds its modules' versions.
            checkpoint['state_dict'].update(found.tensors)
        else:
            checkpoint['state_dict'] = tensors | found.tensors

    def _convert(self, checkpoint: dict[str, Any], backbone: nn.Module | None, runner: Runner) -> None:
        converted, report = convert_checkpoint(checkpoint, source=self.source)
        runner.logger.info(f"{self.source}: the authors' {report.kind}, {report.model}, is converted to our names.")
        if (
            report.kind == CLASSIFIER
            and not self.whole
            and isinstance(backbone, SSMBackbone)
            and not returns_last_stage_alone(backbone)
        ):
            norm = f'backbone.norm{len(backbone.num_features) - 1}.'
            converted['state_dict'] = {
                name: tensor for name, tensor in converted['state_dict'].items() if not name.startswith(norm)
            }
            runner.logger.info(
                f"{self.source}: the classifier's output norm is left out; detectors and segmentors "
                'start with new ones.'
            )
        checkpoint.clear()
        checkpoint.update(converted)

    def _refuse(self, mismatches: list[Mismatch], what: str, advice: str, prefix: str = '') -> None:
        if mismatches:
            raise CheckpointError(
                f'{self.source} does not fit the {what} of the config: {explain(mismatches, prefix)}. {advice}'
            )


def _is_foreign_output(mismatch: Mismatch, backbone: nn.Module) -> bool:
    """Whether a host library's backbone has, or lacks, an output norm, as its classifiers and detectors differ."""
    return (
        not isinstance(backbone, SSMBackbone)
        and mismatch.kind != 'shape'
        and OUTPUT.fullmatch(mismatch.name.partition('.')[0]) is not None
    )
