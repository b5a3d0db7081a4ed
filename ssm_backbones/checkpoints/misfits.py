"""What of a checkpoint's tensors does not fit a model, by our names: a line for each."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor, nn

from ssm_backbones.backbones.base import SSMBackbone
from ssm_backbones.checkpoints.recognise import differences, shapes_of

# Where a backbone ends depends on what it is for: a classifier has one output norm, a pyramid norms of its own.
OUTPUTS = re.compile(r'(norm\d+|pyramid)\.')
_SHAPES = re.compile(r'.*?size mismatch for (\S+): .*?Size\(\[(.*?)\]\).*?Size\(\[(.*?)\]\)\.?')


class Fit(NamedTuple):
    """A checkpoint's backbone beside one that was built, which may end elsewhere."""

    tensors: dict[str, Tensor]
    """Those that are not of parts that the backbone was built without."""
    lacking: list[str]
    """The output norms, and the pyramid, that the backbone has and the checkpoint lacks altogether."""
    wrong: list[str]
    """A line for each tensor that does not fit."""


def fit_backbone(backbone: SSMBackbone, tensors: Mapping[str, Tensor]) -> Fit:
    """Compare a checkpoint's backbone with one that was built; nothing is loaded."""
    tensors = {name: tensor for name, tensor in tensors.items() if not backbone.leaves_out(name)}
    expected = shapes_of(backbone.state_dict())
    outputs = {name.partition('.')[0] for name in expected if OUTPUTS.match(name)}
    lacking = sorted(outputs - {name.partition('.')[0] for name in tensors})
    expected = {name: shape for name, shape in expected.items() if name.partition('.')[0] not in lacking}
    return Fit(tensors, lacking, differences(tensors, expected))


def load_and_compare(module: nn.Module, tensors: Mapping[str, Tensor]) -> list[str]:
    """One line for each tensor that is of another shape, or else for each that is missing or not expected.

    They are loaded to find out: modules of the host libraries may mend older names and shapes meanwhile.
    """
    try:
        missing, unexpected = module.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        return [_SHAPES.sub(r'\1 is (\2), expected (\3)', line.strip()) for line in str(error).splitlines()[1:]]
    lines = [f'{name} is missing' for name in missing if not name.endswith('num_batches_tracked')]
    return lines + [f'{name} is not expected' for name in unexpected]
