"""Load checkpoints, official ones or of this package, into the models of timm's interface."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ssm_backbones.checkpoints import CheckpointError, adapt_stem, read_checkpoint
from ssm_backbones.checkpoints.convert import adapted_backbone
from ssm_backbones.checkpoints.differences import compare, explain, fit, shapes_of
from ssm_backbones.checkpoints.identify import FAMILIES, identify_official
from ssm_backbones.checkpoints.loading import refuse_integers, remedy
from ssm_backbones.checkpoints.locate import choose_weights, holds_official, own_weights, without_wrappers
from ssm_backbones.checkpoints.report import start_report
from ssm_backbones.timm.classifier import SSMClassifier
from ssm_backbones.timm.features import SSMFeatures
from ssm_backbones.utils.mm import print_log


def load_weights(
    model: SSMClassifier | SSMFeatures, checkpoint: str | os.PathLike[str] | Mapping[str, Any], first_conv: str
) -> None:
    """Load the backbone, and a classifier's head if the checkpoint has one, strictly.

    The stem is adapted to the number of image channels. A head of another number of classes keeps its last layer as
    initialised, as timm does, and a head that is missing all of it; the log says so, and names output norms that are
    missing likewise.

    Args:
        model: The model.
        checkpoint: Path, URL or contents.
        first_conv: Name of the stem's convolution in the model.

    Raises:
        CheckpointError: If the checkpoint cannot be read or the backbone does not match. Nothing is loaded then.
    """
    given = isinstance(checkpoint, Mapping)
    source = 'the state dict' if given else str(checkpoint)
    held = checkpoint if isinstance(checkpoint, Mapping) else read_checkpoint(checkpoint)
    backbone = model.backbone
    if holds_official(held, FAMILIES):
        chosen = choose_weights(held, 'auto', FAMILIES, source)
        official, _ = identify_official(chosen, source)
        tensors = adapted_backbone(official, backbone.in_channels, start_report(official, source, chosen.label))
        head = dict(official.head)
    else:
        whole = without_wrappers(own_weights(held), model.state_dict(), source)
        tensors = {name[9:]: tensor for name, tensor in whole.items() if name.startswith('backbone.')}
        head = {name: tensor for name, tensor in whole.items() if name.startswith('head.')}
        if not tensors:
            tensors, head = without_wrappers(own_weights(held), backbone.state_dict(), source), {}
        stem = f'{first_conv.removeprefix("backbone.")}.weight'
        if stem in tensors and tensors[stem].ndim == 4 and tensors[stem].shape[1] != backbone.in_channels:
            tensors[stem] = adapt_stem(tensors[stem], backbone.in_channels)
    found = fit(backbone, tensors)
    if found.mismatches:
        raise CheckpointError(
            f'{source} does not fit the {type(backbone).__name__} that was built: {explain(found.mismatches)}. '
            f'{remedy(found.mismatches)}'
        )
    refuse_integers(found.tensors)
    initial = [f'backbone.{name}' for name in found.initial]
    if isinstance(model, SSMClassifier):
        initial += _load_head(model, head, source)
    backbone.load_state_dict(found.tensors, strict=False)
    if initial:
        print_log(f'{source}: {", ".join(initial)} kept as initialised.', logger='current')


def _load_head(model: SSMClassifier, tensors: Mapping[str, Tensor], source: str) -> list[str]:
    """Load a classifier's head, or the part of it that does not depend on the classes; return what was not loaded."""
    expected = shapes_of({f'head.{name}': tensor for name, tensor in model.head.state_dict().items()})
    last = f'head.{model.classifier_name}.'
    if not tensors:
        return sorted({name.rpartition('.')[0] for name in expected})
    found = shapes_of(tensors)
    if (
        any(found.get(name) != shape for name, shape in expected.items() if name.startswith(last))
        or not model.num_classes
    ):
        found = {name: shape for name, shape in found.items() if not name.startswith(last)}
        expected = {name: shape for name, shape in expected.items() if not name.startswith(last)}
    mismatches = compare(found, expected)
    if mismatches:
        raise CheckpointError(
            f"{source} does not fit the {type(model.backbone).__name__}'s head: {explain(mismatches)}."
        )
    model.head.load_state_dict({name[5:]: tensors[name] for name in found}, strict=False)
    return [] if not model.num_classes or f'{last}weight' in found else [last.rstrip('.')]
