"""Whole checkpoints on their way into a runner: the authors' are converted, and what does not fit is refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmengine.hooks import Hook
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.runner import Runner
from torch import Tensor, nn

from ssm_backbones.backbones.base import SSMBackbone
from ssm_backbones.checkpoints.convert import convert_checkpoint
from ssm_backbones.checkpoints.files import CheckpointError
from ssm_backbones.checkpoints.misfits import OUTPUTS, load_and_compare
from ssm_backbones.checkpoints.recognise import FAMILIES, differences, shapes_of, shorten
from ssm_backbones.checkpoints.weights import holds_official
from ssm_backbones.layers.token_grid import TokenGrid

# The normalisation of pictures, which the config gives, and averages that mmdet 2's hook kept among the weights.
_BESIDE = ('data_preprocessor.', 'ema_')


class FittingCheckpoint(Hook):
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
        if self.convert and holds_official(checkpoint, FAMILIES):
            converted, report = convert_checkpoint(checkpoint, source=self.source)
            checkpoint.clear()
            checkpoint.update(converted)
            runner.logger.info(f"{self.source}: the authors' {report.kind}, {report.model}, is converted to our names.")
        elif not isinstance(checkpoint.get('state_dict'), dict):
            # Bare tensors; a runner's other hooks look for them here.
            checkpoint['state_dict'] = {name: value for name, value in checkpoint.items() if isinstance(value, Tensor)}
        held = checkpoint['state_dict']
        if self.convert:
            # Loading does this too, but does and logs it for the check, for a hook's averages and for the model.
            for name, module in model.named_modules():
                if isinstance(module, TokenGrid):
                    module.resize_saved(held, f'{name}.')
                    module.resize_saved(held, f'module.{name}.')
        weights = {
            name.removeprefix('module.'): value
            for name, value in held.items()
            if not name.removeprefix('module.').startswith(self.unused)
        }
        if self.whole:
            wrong = [line for line in load_and_compare(model, weights) if not line.startswith(self.unused)]
            if not wrong and not self.convert:
                # What loading would resize; the optimiser's averages of it have the old shape.
                shapes = shapes_of(model.state_dict())
                held = {name: value for name, value in weights.items() if value.shape != shapes.get(name, value.shape)}
                wrong = differences(held, {name: shapes[name] for name in held})
            what, remedy = 'model', 'Name the checkpoint that was trained with this config.'
        else:
            wrong = _backbone_differences(model, weights)
            what = 'backbone'
            remedy = (
                'Name a checkpoint of a model with this backbone; a bare backbone is loaded by '
                "model.backbone.init_cfg=dict(type='Pretrained', checkpoint=...)."
            )
        if wrong:
            raise CheckpointError(f'{self.source} does not fit the {what} of the config: {shorten(wrong)}. {remedy}')


def _backbone_differences(model: nn.Module, weights: dict[str, Tensor]) -> list[str]:
    backbone = getattr(model, 'backbone', None)
    if not isinstance(backbone, nn.Module):
        return []
    prefix = 'backbone.'
    inside = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    if isinstance(backbone, SSMBackbone):
        inside = {name: value for name, value in inside.items() if not backbone.leaves_out(name)}
    return [f'{prefix}{line}' for line in load_and_compare(backbone, inside) if not _is_output(line)]


def _is_output(line: str) -> bool:
    # A line that ends in a bracket is of one that is there and does not fit.
    return OUTPUTS.match(line) is not None and not line.endswith(')')
