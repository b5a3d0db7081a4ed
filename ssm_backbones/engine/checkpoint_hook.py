"""Runner hook that converts official checkpoints and rejects checkpoints that do not match the model."""

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

# Image normalisation is set by the config; 'ema_' are averages that mmdet 2's hook stored among the weights.
_IGNORED = ('data_preprocessor.', 'ema_')


class LoadCheckpointHook(Hook):
    """Hook that converts official checkpoints on loading and rejects those that do not match the runner's model.

    mmengine itself loads only the tensors that match and ignores the rest, so that a checkpoint of another model would
    leave the model at its initial weights.

    Args:
        source: The file's name, for messages.
        whole: Whether the file has to contain the whole model, as for testing, or only the backbone, as for
            fine-tuning.
        unused: Prefixes of names that may be missing from the file or the model.
        convert: Whether to convert official checkpoints and resize position embeddings; False when resuming.
    """

    # Runs before other hooks that read the checkpoint's weights, such as EMAHook.
    priority = 'VERY_HIGH'

    def __init__(self, source: str, whole: bool, unused: Sequence[str] = (), convert: bool = True) -> None:
        self.source = source
        self.whole = whole
        self.unused = (*_IGNORED, *unused)
        self.convert = convert

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Convert the checkpoint in place and compare it with the runner's model.

        Raises:
            CheckpointError: If tensors are missing, unexpected or of another shape. The message names the first ones.
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
        # The runner and its other hooks read 'state_dict'; position embeddings in it are resized now.
        if tensors.keys() == held.keys() and isinstance(checkpoint.get('state_dict'), dict):
            # Updating in place keeps the modules' versions in the dict's _metadata.
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
    """Return whether the mismatch is a missing or unexpected output norm of a host library's backbone.

    The host libraries' classifiers and detectors differ in these norms.
    """
    return (
        not isinstance(backbone, SSMBackbone)
        and mismatch.kind != 'shape'
        and OUTPUT.fullmatch(mismatch.name.partition('.')[0]) is not None
    )
