"""Load a checkpoint's tensors into a module; all loaders compare strictly before anything is loaded."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

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
from ssm_backbones.utils.mm import print_log

_CLASS_TOKEN = 'patch_embed.cls_token'


def load_tensors(module: nn.Module, tensors: Mapping[str, Tensor], refuse: Callable[[list[Mismatch]], str]) -> Fit:
    """Load tensors into a module if they match according to :func:`fit`, else load nothing.

    Args:
        module: A backbone, another part of a model, or a whole model.
        tensors: Tensors by name relative to the module.
        refuse: Builds the error message from the mismatches.

    Raises:
        CheckpointError: If there are mismatches, or a backbone's tensors are not floating-point.
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
    """Load a backbone from a checkpoint, official or of this package, strictly.

    Stages, output norms and a pyramid that the backbone was built without are left out. Output norms and a pyramid that
    are missing from the checkpoint keep their values; the log names them. A plain V2M's position embedding is resized
    bicubically to the backbone's ``img_size``. Any other mismatch is an error, and then nothing is loaded.

    Args:
        backbone: The backbone to load the weights into.
        checkpoint: Path or URL. A common prefix of the backbone's names is removed and logged.

    Raises:
        CheckpointError: If the file cannot be read or does not match.
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
        print_log(f'{source}: {", ".join(found.initial)} missing, kept as initialised.', logger='current')


def load_official(
    model: nn.Module,
    checkpoint: str | os.PathLike[str],
    *,
    weights: str = 'auto',
    in_channels: int | None = None,
    classifier_norm: bool = True,
) -> Report:
    """Load the backbone of an official checkpoint into a model of this package, strictly.

    The checkpoint may be of a classifier, a detector or a segmentor; its backbone is loaded. Parts that the model was
    built without (stages after the last of its ``out_indices``, output norms of other stages) are left out. Output
    norms that are missing from the checkpoint (classifiers have only the last one) keep their initial values. The
    report names both. Any other mismatch is an error, and then nothing is loaded.

    Args:
        model: A VMamba or Mamba2D.
        checkpoint: Path or URL.
        weights: Set of weights in the file, see :func:`convert_checkpoint`.
        in_channels: Number of image channels to adapt the stem to, see :func:`adapt_stem`; the model has to be built
            with the same number.
        classifier_norm: Whether to load a VMamba classifier's output norm, that of the last stage, if the model has
            one. False keeps its initial values, as in the authors' detectors and segmentors. A detector's or
            segmentor's own output norms are always loaded.

    Returns:
        A report of the tensors that were loaded and left out.

    Raises:
        CheckpointError: If the file cannot be read, is not exactly an official checkpoint, or has another arch.
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
    """Return whether a backbone returns only the last stage's map, as a classifier's does."""
    return backbone.out_indices == (len(backbone.num_features) - 1,)


def without_classifier_norm(found: Identified, tensors: dict[str, Tensor], report: Report) -> dict[str, Tensor]:
    """Drop the output norm of a classifier from the tensors of its backbone, and report it."""
    last = len(found.settings['depths']) - 1
    if found.kind == WHOLE or found.norms != (last,):
        return tensors
    report.left_out[f'norm{last}'] = "the classifier's own"
    report.initial[f'norm{last}'] = "a classifier's output norm is not loaded (classifier_norm)"
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(f'norm{last}.')}


def remedy(mismatches: Sequence[Mismatch]) -> str:
    """Return what to do about a backbone's mismatches."""
    if len(mismatches) == 1:
        (mismatch,) = mismatches
        # Class tokens take part in the scans, so a backbone with other ones computes different maps.
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
