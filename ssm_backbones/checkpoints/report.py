"""What a conversion did, for people to read."""

from __future__ import annotations

from dataclasses import dataclass, field

from ssm_backbones.checkpoints.differences import shorten
from ssm_backbones.checkpoints.identify import Identified, describe
from ssm_backbones.checkpoints.locate import WeightSet


@dataclass
class Report:
    """What was found in a checkpoint and what became of it."""

    source: str
    """The file."""
    kind: str
    """'classifier', 'backbone' or 'whole model' (a detector or segmentor)."""
    model: str
    """The family and the arch that fits, as one writes them in a config."""
    weights: str
    """Which of the file's weights were taken."""
    tensors: dict[str, int]
    """How many tensors went where."""
    left_out: dict[str, str] = field(default_factory=dict)
    """What the file holds and the result does not, and why."""
    initial: dict[str, str] = field(default_factory=dict)
    """What the model holds and the file does not, so that it stays as initialised, and why."""
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f'{self.source}: {self.kind}, {self.model} (weights: {self.weights})']
        lines += [f'{where}: {number} tensors' for where, number in self.tensors.items()]
        lines += [f'left out: {what}: {why}' for what, why in self.left_out.items()]
        lines += [f'left as initialised: {what}: {why}' for what, why in self.initial.items()]
        return '\n  '.join(lines + self.notes)


def start_report(found: Identified, source: str, weights: str) -> Report:
    """What there is to say of an identified model before anything becomes of it."""
    sizes = {'backbone': len(found.backbone), 'head': len(found.head), 'passed through': len(found.rest)}
    return Report(
        source,
        found.kind,
        describe(found.family, found.settings),
        weights,
        {where: number for where, number in sizes.items() if number},
    )


def leave_out_other_weights(weights: WeightSet, report: Report) -> None:
    """Note what was found beside the weights that were chosen."""
    if weights.outside:
        report.left_out[shorten(weights.outside, ', ')] = f'beside the model in {weights.label}'
    if weights.others:
        report.left_out[', '.join(other.label for other in weights.others)] = 'other weights, to be chosen by this name'


def leave_out_the_rest(found: Identified, report: Report) -> None:
    """Note that a bare backbone holds neither the head nor what else was in the file."""
    for tensors, where in ((found.head, 'head'), (found.rest, 'passed through')):
        if tensors:
            del report.tensors[where]
            report.left_out[shorten(list(tensors), ', ')] = 'a bare backbone does not hold it'
