"""Convert official checkpoints to ours and back."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ssm_backbones.checkpoints.differences import shapes_of, shorten
from ssm_backbones.checkpoints.files import CheckpointError, check_destination, read_checkpoint, write_checkpoint
from ssm_backbones.checkpoints.identify import (
    BACKBONE,
    CLASSIFIER,
    FAMILIES,
    WHOLE,
    Identified,
    describe,
    identify_official,
    identify_ours,
)
from ssm_backbones.checkpoints.locate import choose_weights, without_wrapper_of_blocks
from ssm_backbones.checkpoints.naming import official_layout
from ssm_backbones.checkpoints.report import (
    Report,
    leave_out_other_weights,
    leave_out_the_rest,
    start_report,
)

RECORD = 'ssm_backbones'
"""Key in a converted checkpoint's ``meta`` of the metadata for the reverse conversion."""
_TIED_TO_PARAMETERS = ('optimizer', 'ema_state_dict')


def convert_checkpoint(
    checkpoint: Mapping[str, Any],
    *,
    source: str = 'the checkpoint',
    weights: str = 'auto',
    backbone_only: bool = False,
    in_channels: int | None = None,
) -> tuple[dict[str, Any], Report]:
    """Convert an official checkpoint into one that OpenMMLab's runners load.

    A classification checkpoint becomes an mmpretrain one (``backbone.*``, ``head.*``); in a detector's or segmentor's
    the backbone is converted and everything else is kept unchanged; a bare backbone stays bare.

    Args:
        checkpoint: The contents of the file.
        source: The file's name, for messages.
        weights: Set of weights: 'auto' for the main weights, 'raw' for weights that are not moving averages, 'ema' for
            the moving averages, or the label of a set. The error for an ambiguous choice lists the labels.
        backbone_only: Convert only the backbone, with names without ``backbone.``.
        in_channels: Number of image channels to adapt the stem to, see :func:`adapt_stem`.

    Returns:
        The converted checkpoint (``meta`` and ``state_dict``) and the report.

    Raises:
        CheckpointError: If the file is not exactly an official checkpoint.
    """
    chosen = choose_weights(checkpoint, weights, FAMILIES, source)
    found, dialect = identify_official(chosen, source)
    bare = backbone_only or found.kind == BACKBONE
    record = dict(
        model=describe(found.family, found.settings),
        kind=BACKBONE if bare else found.kind,
        settings=found.settings,
        dialect=dialect,
        prefix=chosen.prefix,
        path=list(chosen.path) if len(chosen.path) < 2 else [found.family.main_key],
    )

    report = start_report(found, source, chosen.label)
    leave_out_other_weights(chosen, report)
    backbone = adapted_backbone(found, in_channels, report)
    weights_at = {path[0] for path in (chosen.path, *(other.path for other in chosen.others)) if path}
    beside, meta = _passed_through(checkpoint, weights_at, found.kind == WHOLE and not backbone_only, report)
    converted: dict[str, Any] = dict(meta={**meta, RECORD: record}, state_dict=backbone, **beside)
    if bare:
        leave_out_the_rest(found, report)
    else:
        converted['state_dict'] = {f'backbone.{name}': tensor for name, tensor in backbone.items()}
        converted['state_dict'].update(found.head or found.rest)
        if found.kind == WHOLE and found.norms:
            report.notes.append(f"the config's backbone needs out_indices={found.norms}")
    return converted, report


def restore_checkpoint(
    checkpoint: Mapping[str, Any], *, source: str = 'the checkpoint'
) -> tuple[dict[str, Any], Report]:
    """Convert a checkpoint of ours, converted or trained, back to the official names, shapes and keys.

    Metadata that :func:`convert_checkpoint` recorded in ``meta`` selects among the authors' naming schemes. Without it
    (after training), classifiers get the names of the authors' classifiers, other models those of their detectors.

    Args:
        checkpoint: The contents of the file: ``state_dict`` and optionally ``meta``, or the tensors themselves.
        source: The file's name, for messages.

    Returns:
        The official checkpoint and the report.

    Raises:
        CheckpointError: If the file is not exactly a checkpoint of ours.
    """
    path = ('state_dict',) if isinstance(checkpoint.get('state_dict'), Mapping) else ()
    held = without_wrapper_of_blocks(checkpoint['state_dict'] if path else checkpoint, source)
    found = identify_ours(held, source)
    note = _note(checkpoint, found)
    naming, head_naming = found.family.naming(note['dialect']), found.family.head_naming(note['dialect'])
    try:
        layout = official_layout(naming, shapes_of(found.backbone), note['prefix'])
        layout |= official_layout(head_naming, shapes_of(found.head))
    except LookupError as error:
        raise CheckpointError(
            f'{source}: {error.args[0]} in the spelling of {note["dialect"]}; a classifier has the '
            'output norm of the last stage alone.'
        ) from error
    ours = {**found.backbone, **found.head}
    tensors = {name: ours[own].detach().reshape(shape) for name, (own, shape) in layout.items()} | found.rest

    report = start_report(found, source, '/'.join(path) or 'top')
    beside, meta = _passed_through(checkpoint, set(path), found.kind == WHOLE, report)
    meta.pop(RECORD, None)
    restored: dict[str, Any] = {**({'meta': meta} if meta else {}), **beside}
    if note['path']:
        restored[note['path'][0]] = tensors
    else:
        restored.update(tensors)
    return restored, report


def convert_file(
    source: str | os.PathLike[str], destination: str | os.PathLike[str], *, overwrite: bool = False, **options: Any
) -> Report:
    """Convert an official checkpoint at a path or URL to a file; ``options`` are those of :func:`convert_checkpoint`.

    Raises:
        CheckpointError: If a file cannot be read, converted or written. The destination is not created then.
    """
    check_destination(destination, overwrite)
    converted, report = convert_checkpoint(read_checkpoint(source), source=str(source), **options)
    write_checkpoint(converted, destination, overwrite)
    return report


def restore_file(
    source: str | os.PathLike[str], destination: str | os.PathLike[str], *, overwrite: bool = False
) -> Report:
    """Convert a checkpoint of ours at a path or URL back to an official file, see :func:`restore_checkpoint`.

    Raises:
        CheckpointError: If a file cannot be read, converted or written. The destination is not created then.
    """
    check_destination(destination, overwrite)
    restored, report = restore_checkpoint(read_checkpoint(source), source=str(source))
    write_checkpoint(restored, destination, overwrite)
    return report


def adapted_backbone(found: Identified, in_channels: int | None, report: Report) -> dict[str, Tensor]:
    """Return the backbone of an identified model, with its stem adapted to ``in_channels`` unless that is None."""
    if in_channels is None or in_channels == found.in_channels:
        return found.backbone
    report.notes.append(f'stem adapted from {found.in_channels} to {in_channels} channels of the image')
    return {**found.backbone, found.stem: adapt_stem(found.backbone[found.stem], in_channels)}


def adapt_stem(weight: Tensor, in_channels: int) -> Tensor:
    """Adapt the weight of a stem to another number of image channels.

    Channel i of the new image is treated as channel ``i % C`` of the old one, and the weight is scaled by
    ``C / in_channels``, so that channels of equal content give the same output as before (exactly, if C divides
    ``in_channels``). For a single channel the old weights are summed: the output is that of a grey image.

    Args:
        weight: Floating-point weight (C_out, C, kernel, kernel).
        in_channels: Channels of the new images, at least 1.

    Returns:
        (C_out, in_channels, kernel, kernel), of the same dtype.
    """
    if in_channels < 1:
        raise CheckpointError(f'in_channels must be at least 1, got {in_channels}')
    old = weight.shape[1]
    exact = weight.double()
    if in_channels == 1:
        adapted = exact.sum(1, keepdim=True)
    else:
        adapted = exact[:, torch.arange(in_channels) % old] * (old / in_channels)
    return adapted.to(weight.dtype)


def _passed_through(
    checkpoint: Mapping[str, Any], weights_at: set[str], whole: bool, report: Report
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the entries of a file besides its weights that stay valid, and its ``meta``.

    Args:
        checkpoint: The contents of the file.
        weights_at: Keys of the weights; empty if the file contains nothing else.
        whole: Whether this is a runner's checkpoint of a whole model; from others nothing is kept.
        report: The report, to which entries that are left out are added.
    """
    others = {key: value for key, value in checkpoint.items() if weights_at and key not in weights_at}
    meta = others.get('meta')
    if not isinstance(meta, Mapping):
        meta = {}
    elif whole or meta.keys() <= {RECORD}:
        del others['meta']
    if not whole:
        if others:
            report.left_out[shorten([str(key) for key in others], ', ')] = 'no part of the weights'
        return {}, {}
    tied = [key for key in _TIED_TO_PARAMETERS if key in others]
    if tied:
        report.left_out[', '.join(tied)] = "tied to the other side's parameters by name or order"
    return {key: value for key, value in others.items() if key not in tied}, dict(meta)


def _note(checkpoint: Mapping[str, Any], found: Identified) -> dict[str, Any]:
    """Return the metadata for the reverse conversion: recorded if still valid, else the published defaults."""
    family = found.family
    only_last_norm = found.norms == (len(found.settings['depths']) - 1,)
    classifier = found.kind == CLASSIFIER or (found.kind == BACKBONE and only_last_norm)
    default = dict(
        dialect=family.default_dialect(found.settings, classifier),
        prefix='backbone.' if found.kind == WHOLE else family.classifier_prefix,
        path=['state_dict' if found.kind == WHOLE else family.main_key],
    )
    meta = checkpoint.get('meta')
    noted = meta.get(RECORD) if isinstance(meta, Mapping) else None
    if not isinstance(noted, Mapping) or (noted.get('settings'), noted.get('kind')) != (found.settings, found.kind):
        return default
    return {key: noted.get(key, published) for key, published in default.items()}
