"""Reports of conversions."""

from __future__ import annotations

from dataclasses import dataclass, field

from ssm_backbones.checkpoints.differences import shorten
from ssm_backbones.checkpoints.identify import Identified, describe
from ssm_backbones.checkpoints.locate import WeightSet


@dataclass
class Report:
    """Contents of a checkpoint and the result of its conversion or loading."""

    source: str
    """The file."""
    kind: str
    """'classifier', 'backbone' or 'whole model' (a detector or segmentor)."""
    model: str
    """The family and matching arch, as in a config."""
    weights: str
    """The label of the set of weights that was chosen."""
    tensors: dict[str, int]
    """Number of tensors by destination."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Parts of the file that are not in the result, with the reasons."""
    initial: dict[str, str] = field(default_factory=dict)
    """Parts of the model that are not in the file and keep their initial values, with the reasons."""
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f'{self.source}: {self.kind}, {self.model} (weights: {self.weights})']
        lines += [f'{where}: {number} tensors' for where, number in self.tensors.items()]
        lines += [f'left out: {what}: {why}' for what, why in self.left_out.items()]
        lines += [f'left as initialised: {what}: {why}' for what, why in self.initial.items()]
        return '\n  '.join(lines + self.notes)


def start_report(found: Identified, source: str, weights: str) -> Report:
    """Build the report of an identified model before its conversion."""
    sizes = {'backbone': len(found.backbone), 'head': len(found.head), 'passed through': len(found.rest)}
    return Report(
        source,
        found.kind,
        describe(found.family, found.settings),
        weights,
        {where: number for where, number in sizes.items() if number},
    )


def leave_out_other_weights(weights: WeightSet, report: Report) -> None:
    """Report the weights that were not chosen as left out."""
    if weights.outside:
        report.left_out[shorten(weights.outside, ', ')] = f'beside the model in {weights.label}'
    if weights.others:
        report.left_out[', '.join(other.label for other in weights.others)] = 'other weights, to be chosen by this name'


def leave_out_the_rest(found: Identified, report: Report) -> None:
    """Report the head and everything else outside the backbone as left out."""
    for tensors, where in ((found.head, 'head'), (found.rest, 'passed through')):
        if tensors:
            del report.tensors[where]
            report.left_out[shorten(list(tensors), ', ')] = 'a bare backbone does not hold it'
