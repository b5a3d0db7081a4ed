"""Official checkpoints straight into a backbone: for configs, and for plain PyTorch."""

from __future__ import annotations

import os

import torch
from mmengine.logging import print_log
from mmengine.model import update_init_info
from mmengine.registry import WEIGHT_INITIALIZERS
from torch import Tensor, nn

from ssm_backbones.backbones.base import SSMBackbone
from ssm_backbones.checkpoints.convert import adapted_backbone
from ssm_backbones.checkpoints.files import CheckpointError, read_checkpoint
from ssm_backbones.checkpoints.misfits import fit_backbone
from ssm_backbones.checkpoints.recognise import (
    FAMILIES,
    WHOLE,
    Recognised,
    describe,
    recognise_official,
    shapes_of,
    shorten,
)
from ssm_backbones.checkpoints.report import (
    Report,
    leave_out_other_weights,
    leave_out_the_rest,
    start_report,
)
from ssm_backbones.checkpoints.weights import choose_weights


def load_official(model: nn.Module, checkpoint: str | os.PathLike[str], *, weights: str = 'auto',
                  in_channels: int | None = None, classifier_norm: bool = True) -> Report:
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
    source = str(checkpoint)
    if not any(isinstance(model, family.model) for family in FAMILIES):
        names = ' or '.join(family.name for family in FAMILIES)
        raise CheckpointError(f'official checkpoints are loaded into a backbone, a {names}, not into a '
                              f'{type(model).__name__}. Whole models: convert the file with '
                              'tools/convert_checkpoint.py and name the result in load_from.')
    assert isinstance(model, SSMBackbone), 'families are of backbones'
    if any(tensor.is_meta for tensor in model.state_dict().values()):
        raise CheckpointError(f'the {type(model).__name__} is on the meta device, where nothing can be loaded; move it '
                              "with to_empty(device='cpu') first.")
    chosen = choose_weights(read_checkpoint(checkpoint), weights, FAMILIES, source)
    found, _ = recognise_official(chosen, source)
    report = start_report(found, source, chosen.label)
    leave_out_other_weights(chosen, report)
    leave_out_the_rest(found, report)
    tensors = adapted_backbone(found, in_channels, report)
    if not classifier_norm:
        tensors = without_classifier_norm(found, tensors, report)

    fitting, lacking, wrong = fit_backbone(model, tensors)
    unbuilt = tensors.keys() - fitting.keys()
    for name in sorted({name.rpartition('.blocks.')[0] or name.rpartition('.')[0] for name in unbuilt}):
        report.left_out[name] = f'the model is built for out_indices={model.out_indices}'
    for name in lacking:
        report.initial.setdefault(name, 'the checkpoint has no output norm for this stage')
    if wrong:
        raise CheckpointError(_explain_misfit(model, found, tensors[found.stem], wrong, source))

    report.tensors = {'backbone': len(fitting)}
    state = model.state_dict()
    with torch.no_grad():
        for name, tensor in fitting.items():
            state[name].copy_(tensor)
    return report


@WEIGHT_INITIALIZERS.register_module(name='OfficialPretrained')
class OfficialPretrainedInit:
    """``init_cfg=dict(type='OfficialPretrained', checkpoint=...)`` of a backbone: :func:`load_official`.

    Args:
        checkpoint: path or URL of a checkpoint of the authors'.
        weights: which of the file's weights, see :func:`convert_checkpoint`.
        in_channels: adapt the stem to images of so many channels, see :func:`adapt_stem`.
        classifier_norm: whether a classifier's output norm is loaded, see :func:`load_official`. None loads it into a
            backbone that returns the last stage's map alone, as a classifier's does; a backbone that returns any other
            maps starts with new output norms for all of them, as in the authors' detectors and segmentors.
    """

    def __init__(self, checkpoint: str, weights: str = 'auto', in_channels: int | None = None,
                 classifier_norm: bool | None = None) -> None:
        self.checkpoint = checkpoint
        self.weights = weights
        self.in_channels = in_channels
        self.classifier_norm = classifier_norm

    def __call__(self, module: nn.Module) -> None:
        classifier_norm = self.classifier_norm
        if classifier_norm is None:
            classifier_norm = isinstance(module, SSMBackbone) and returns_last_stage_alone(module)
        report = load_official(module, self.checkpoint, weights=self.weights, in_channels=self.in_channels,
                               classifier_norm=classifier_norm)
        print_log(str(report), logger='current')
        if hasattr(module, '_params_init_info'):
            update_init_info(module, init_info=f'OfficialPretrained: load from {self.checkpoint}')


def returns_last_stage_alone(backbone: SSMBackbone) -> bool:
    """Whether a backbone is built as a classifier's: detectors and segmentors start with new output norms."""
    return backbone.out_indices == (len(backbone.num_features) - 1,)


def without_classifier_norm(found: Recognised, tensors: dict[str, Tensor], report: Report) -> dict[str, Tensor]:
    """A backbone's tensors without the output norm of the classifier that it is of, and a report that says so."""
    last = len(found.settings['depths']) - 1
    if found.kind == WHOLE or found.norms != (last,):
        return tensors
    report.left_out[f'norm{last}'] = "the classifier's own"
    report.initial[f'norm{last}'] = "output norms start anew where a classifier's is not taken (classifier_norm)"
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(f'norm{last}.')}


def _explain_misfit(model: SSMBackbone, found: Recognised, stem: Tensor, lines: list[str], source: str) -> str:
    held = describe(found.family, found.settings)
    if [line.split()[0] for line in lines] == [found.stem] and stem.shape[1] != model.in_channels:
        return (f'{source} ({held}) is for images of {stem.shape[1]} channels, the model for {model.in_channels}; '
                f'in_channels={model.in_channels} beside the checkpoint adapts the stem.')
    return (f'{source} is a checkpoint of {held} and does not fit the model, {_describe_model(model)}. '
            f'{len(lines)} tensors of the checkpoint differ: {shorten(lines)}.')


def _describe_model(model: SSMBackbone) -> str:
    family = next(family for family in FAMILIES if isinstance(model, family.model))
    if model.num_built_stages < len(model.num_features):
        return f'a {family.name} of {model.num_features[0]} channels in the first stage'
    return describe(family, family.settings(shapes_of(model.state_dict())))
