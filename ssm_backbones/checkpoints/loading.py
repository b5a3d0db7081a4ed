"""The one way by which a checkpoint's tensors get into a module, compared strictly before anything is loaded."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mmengine.logging import print_log
from torch import Tensor, nn

from ssm_backbones.backbones.base import SSMBackbone
from ssm_backbones.checkpoints.convert import adapted_backbone
from ssm_backbones.checkpoints.differences import Fit, Mismatch, explain, fit, shapes_of
from ssm_backbones.checkpoints.files import CheckpointError, read_checkpoint
from ssm_backbones.checkpoints.identify import FAMILIES, WHOLE, Identified, describe, identify_official
from ssm_backbones.checkpoints.locate import choose_weights, own_weights, without_wrappers
from ssm_backbones.checkpoints.report import (
    Report,
    leave_out_other_weights,
    leave_out_the_rest,
    start_report,
)

_CLASS_TOKEN = 'patch_embed.cls_token'


def load_tensors(module: nn.Module, tensors: Mapping[str, Tensor], refuse: Callable[[list[Mismatch]], str]) -> Fit:
    """Load tensors by a module's own names if they fit, as :func:`fit` says; nothing at all if not.

    Args:
        module: a backbone, another part of a model, or a whole model.
        tensors: by names relative to the module.
        refuse: makes the error's text of the mismatches.

    Raises:
        CheckpointError: if there are mismatches, or tensors of other than floating-point numbers among a backbone's.
    """
    found = fit(module, tensors)
    if found.mismatches:
        raise CheckpointError(refuse(found.mismatches))
    if isinstance(module, SSMBackbone):
        refuse_integers(found.tensors)
    module.load_state_dict(found.tensors, strict=False)
    return found


def refuse_integers(tensors: Mapping[str, Tensor]) -> None:
    """Raise a CheckpointError if weights of a backbone are of other than floating-point numbers."""
    integers = [name for name, tensor in tensors.items() if not tensor.is_floating_point()]
    if integers:
        raise CheckpointError(
            f'{integers[0]} is of {tensors[integers[0]].dtype}, expected floating-point '
            'numbers; quantised weights cannot be loaded.'
        )


def load_backbone(backbone: SSMBackbone, checkpoint: str | os.PathLike[str]) -> None:
    """Load the backbone that a checkpoint holds, official or of this package, strictly.

    Stages, output norms and a pyramid that the backbone was built without are left out. Output norms and a pyramid that
    the checkpoint lacks stay as they are, which the log names. A plain V2M's position embedding is resized bicubically
    to the backbone's ``img_size``. Anything else that does not fit is an error, and then nothing is loaded.

    Args:
        backbone: where to load the weights.
        checkpoint: path or URL. Whatever common prefix stands before the backbone's names is taken off, as the log
            says.

    Raises:
        CheckpointError: if the file cannot be read or does not fit.
    """
    source = str(checkpoint)
    held = read_checkpoint(checkpoint)
    tensors = without_wrappers(own_weights(held), backbone.state_dict(), source)
    if not any('.mixer.' in name for name in tensors):
        _load_official(backbone, held, source, in_channels=backbone.in_channels)
        return
    found = load_tensors(
        backbone,
        tensors,
        lambda mismatches: (
            f'{source} does not fit the {type(backbone).__name__} that was built: {explain(mismatches)}. '
            f'{remedy(mismatches)}'
        ),
    )
    if found.initial:
        print_log(f'{source} lacks {", ".join(found.initial)}: kept as initialised.', logger='current')


def load_official(
    model: nn.Module,
    checkpoint: str | os.PathLike[str],
    *,
    weights: str = 'auto',
    in_channels: int | None = None,
    classifier_norm: bool = True,
) -> Report:
    """Load the backbone of an official checkpoint into a model of this package, strictly.

    Whatever the checkpoint is of, a classifier, a detector or a segmentor, the backbone is taken from it. Parts of it
    that the model was built without (stages behind the last of its ``out_indices``, output norms of stages that are
    not among them) are left out; output norms that the checkpoint lacks, as those of classifiers lack all but the
    last, stay as initialised. The report names both. Anything else that does not fit is an error, and then nothing is
    loaded.

    Args:
        model: a VMamba or Mamba2D.
        checkpoint: path or URL.
        weights: which of the file's weights, see :func:`convert_checkpoint`.
        in_channels: adapt the stem to images of so many channels, see :func:`adapt_stem`; the model has to be built
            with the same number.
        classifier_norm: whether a VMamba classifier's output norm, that of the last stage, is loaded where the model
            has one. False leaves that norm as initialised too, as the authors' detectors and segmentors have it; a
            detector's or segmentor's own output norms are loaded in any case.

    Returns:
        What was loaded from where and what was not.

    Raises:
        CheckpointError: if the file cannot be read, is not exactly an official checkpoint, or is one of another arch.
    """
    return _load_official(model, read_checkpoint(checkpoint), str(checkpoint), weights, in_channels, classifier_norm)


def _load_official(
    model: nn.Module,
    checkpoint: Mapping[str, Any],
    source: str,
    weights: str = 'auto',
    in_channels: int | None = None,
    classifier_norm: bool = True,
) -> Report:
    if not any(isinstance(model, family.model) for family in FAMILIES):
        names = ' or '.join(family.name for family in FAMILIES)
        raise CheckpointError(
            f'official checkpoints are loaded into a backbone, a {names}, not into a '
            f'{type(model).__name__}. Whole models: convert the file with '
            'tools/convert_checkpoint.py and name the result in load_from.'
        )
    assert isinstance(model, SSMBackbone), 'families are of backbones'
    if any(tensor.is_meta for tensor in model.state_dict().values()):
        raise CheckpointError(
            f'the {type(model).__name__} is on the meta device, where nothing can be loaded; move it '
            "with to_empty(device='cpu') first."
        )
    chosen = choose_weights(checkpoint, weights, FAMILIES, source)
    found, _ = identify_official(chosen, source)
    report = start_report(found, source, chosen.label)
    leave_out_other_weights(chosen, report)
    leave_out_the_rest(found, report)
    tensors = adapted_backbone(found, in_channels, report)
    if not classifier_norm:
        tensors = without_classifier_norm(found, tensors, report)
    loaded = load_tensors(model, tensors, lambda mismatches: _refuse_official(model, found, mismatches, source))
    for name in sorted(
        {name.rpartition('.blocks.')[0] or name.rpartition('.')[0] for name in tensors.keys() - loaded.tensors.keys()}
    ):
        report.left_out[name] = f'the model is built for out_indices={model.out_indices}'
    for name in loaded.initial:
        report.initial.setdefault(name, 'the checkpoint has no output norm for this stage')
    report.tensors = {'backbone': len(loaded.tensors)}
    return report


def returns_last_stage_alone(backbone: SSMBackbone) -> bool:
    """Whether a backbone is built as a classifier's: detectors and segmentors start with new output norms."""
    return backbone.out_indices == (len(backbone.num_features) - 1,)


def without_classifier_norm(found: Identified, tensors: dict[str, Tensor], report: Report) -> dict[str, Tensor]:
    """A backbone's tensors without the output norm of the classifier that it is of, and a report that says so."""
    last = len(found.settings['depths']) - 1
    if found.kind == WHOLE or found.norms != (last,):
        return tensors
    report.left_out[f'norm{last}'] = "the classifier's own"
    report.initial[f'norm{last}'] = "output norms start anew where a classifier's is not taken (classifier_norm)"
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(f'norm{last}.')}


def remedy(mismatches: Sequence[Mismatch]) -> str:
    """What to do about a backbone's mismatches."""
    if len(mismatches) == 1:
        (mismatch,) = mismatches
        # Class tokens take part in the scans, so that a backbone with other ones computes something else.
        if mismatch.name == _CLASS_TOKEN:
            return (
                "Give the cls_token that the checkpoint was trained with: 'mean' has no such weight, the others have."
            )
        if _is_of_other_images(mismatch):
            return (
                'The checkpoint is for images of another number of channels: build the backbone with its '
                'in_channels, or change the weight in the file by ssm_backbones.checkpoints.adapt_stem.'
            )
    return 'Build the arch that the checkpoint is of.'


def _is_of_other_images(mismatch: Mismatch) -> bool:
    found, expected = mismatch.found or (), mismatch.expected or ()
    return (
        mismatch.name.startswith('patch_embed.')
        and len(found) == len(expected) == 4
        and found[::2] + found[3:] == expected[::2] + expected[3:]
    )


def _refuse_official(model: SSMBackbone, found: Identified, mismatches: list[Mismatch], source: str) -> str:
    held = describe(found.family, found.settings)
    if [mismatch.name for mismatch in mismatches] == [found.stem] and _is_of_other_images(mismatches[0]):
        return (
            f'{source} ({held}) is for images of {found.in_channels} channels, the model for {model.in_channels}; '
            f'in_channels={model.in_channels} beside the checkpoint adapts the stem.'
        )
    return (
        f'{source} is a checkpoint of {held} and does not fit the model, {_describe_model(model)}. '
        f'{len(mismatches)} tensors of the checkpoint differ: {explain(mismatches)}.'
    )


def _describe_model(model: SSMBackbone) -> str:
    family = next(family for family in FAMILIES if isinstance(model, family.model))
    if model.num_built_stages < len(model.num_features):
        return f'a {family.name} of {model.num_features[0]} channels in the first stage'
    return describe(family, family.settings(shapes_of(model.state_dict())))
