"""Check state dicts that mmengine or PyTorch load into a backbone; convert official tensors, reject mismatches.

The host libraries' own tools and inferencers load by mmengine, which logs mismatches and continues with the initial
weights. A backbone therefore checks each state dict before it is loaded (:attr:`SSMBackbone.before_loading`), and
:func:`check_pretrained` checks the file named in a config before anything runs.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from ssm_backbones.backbones.base import SSMBackbone
from ssm_backbones.checkpoints.differences import Fit, Mismatch, explain, fit
from ssm_backbones.checkpoints.files import CheckpointError, read_checkpoint
from ssm_backbones.checkpoints.identify import FAMILIES, describe, identify_official
from ssm_backbones.checkpoints.loading import refuse_integers, remedy
from ssm_backbones.checkpoints.locate import (
    WeightSet,
    common_prefix,
    find_official,
    own_weights,
    without_wrappers_if_better,
)
from ssm_backbones.compat import revise_loaded_names
from ssm_backbones.layers.token_grid import TokenGrid
from ssm_backbones.utils.mm import INSTALLED, MODELS, is_model_wrapper, print_log

_OFFICIAL_REMEDY = (
    "For a backbone, init_cfg=dict(type='OfficialPretrained', checkpoint=...) or load_official "
    'converts them; for a whole model, convert the file with tools/convert_checkpoint.py.'
)


def convert_or_refuse(backbone: SSMBackbone, state_dict: dict[str, Any], prefix: str) -> None:
    """Convert official tensors in a state dict in place, and reject mismatches that mmengine would ignore.

    In a whole model, the official tensors of its backbone are converted. If mmengine loads, stem and stages have to
    match exactly, as in every loader of this package; PyTorch's own ``load_state_dict`` reports mismatches itself.

    Args:
        backbone: The backbone that is loaded.
        state_dict: Tensors by name; modified in place.
        prefix: Prefix of the backbone's names, '' for a backbone alone.

    Raises:
        CheckpointError: If the tensors are official and cannot be converted here, or do not match.
    """
    inside = _below(state_dict, prefix)
    own = {name for name, _ in backbone.named_parameters()}
    if inside and own.isdisjoint(inside):
        official = list(find_official(inside, FAMILIES))
        direct = [weights for weights in official if (weights.path, weights.wrapper, weights.prefix) == ((), '', '')]
        if direct and prefix:
            tensors = _converted(backbone, direct[0], prefix).tensors
            for name in inside:
                del state_dict[prefix + name]
            state_dict.update({prefix + name: tensor for name, tensor in tensors.items()})
            return
        if official:
            raise CheckpointError(
                f"the {type(backbone).__name__} is given the authors' tensors, by their names. {_OFFICIAL_REMEDY}"
            )
    # Adapters' files contain only their own tensors; the parts of sharded models have no shapes to compare.
    special = any('lora_' in name for name in own) or any(is_model_wrapper(part) for part in backbone.modules())
    if special or not _mmengine_loads():
        return
    for name, part in backbone.named_modules():
        if isinstance(part, TokenGrid):
            part.resize_saved(state_dict, f'{prefix}{name}.')
    inside = _below(state_dict, prefix)
    found = _fit_known_parts(backbone, inside, everything=bool(prefix))
    if found.mismatches:
        raise CheckpointError(_refuse(backbone, found.mismatches, inside, 'the checkpoint'))
    refuse_integers({name: tensor for name, tensor in found.tensors.items() if name in own})


def check_pretrained(backbone: Mapping[str, Any], key: str) -> None:
    """Check that the local file in a backbone's ``init_cfg`` of type ``Pretrained`` matches the backbone.

    Args:
        backbone: The config of a backbone of this package.
        key: Key of that config, for messages.

    Raises:
        CheckpointError: If it does not match. The message names the first mismatches, or the type or prefix to set.
    """
    init_cfg = backbone['init_cfg']
    source = str(init_cfg['checkpoint'])
    held = read_checkpoint(source)
    state = held['state_dict'] if isinstance(held.get('state_dict'), Mapping) else held
    prefix = init_cfg.get('prefix')
    if prefix:
        inside = _below(state, prefix if prefix.endswith('.') else f'{prefix}.')
    else:
        inside = {re.sub(r'^module\.', '', name): value for name, value in state.items()}
    with torch.device('meta'):
        model = MODELS.build({**backbone, 'type': backbone['type'].rpartition('.')[2], 'init_cfg': None})
    inside = dict(revise_names(model, inside))
    mismatches = [
        mismatch
        for mismatch in _fit_known_parts(model, inside, everything=bool(prefix)).mismatches
        if not _is_resized(mismatch)
    ]
    if not mismatches:
        return
    where = f'{key}.init_cfg: {source}' + (f' (prefix={prefix!r})' if prefix else '')
    if not inside and not model.state_dict().keys().isdisjoint(state):
        raise CheckpointError(f'{where} holds the bare {type(model).__name__}. Leave out the prefix.')
    raise CheckpointError(_refuse(model, mismatches, inside or state, where))


def revise_names(module: nn.Module, state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """Remove a prefix that all names of a state dict carry beside the module's own, as every loader here does.

    Only in models with a backbone of this package, and where more of the module's names are found without the prefix.
    """
    if not any(isinstance(part, SSMBackbone) for part in module.modules()):
        return state_dict
    # Not of state_dict(), which gathers the parts of a sharded model.
    expected = {name for name, _ in [*module.named_parameters(), *module.named_buffers()]}
    if expected <= state_dict.keys():
        return state_dict
    tensors = {name: value for name, value in state_dict.items() if isinstance(value, Tensor)}
    return without_wrappers_if_better(tensors, expected, 'the checkpoint') or state_dict


def names_backbone(kind: Any) -> bool:
    """Return whether a config's ``type`` is a backbone of this package."""
    known = MODELS.get(kind.rpartition('.')[2]) if isinstance(kind, str) else kind
    return isinstance(known, type) and issubclass(known, SSMBackbone)


def _below(state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _converted(backbone: SSMBackbone, weights: WeightSet, prefix: str) -> Fit:
    found, _ = identify_official(weights, f'the checkpoint (names under {prefix!r})')
    held = describe(found.family, found.settings)
    result = fit(backbone, found.backbone)
    if result.mismatches:
        raise CheckpointError(
            f'the checkpoint is of {held} and does not fit the {type(backbone).__name__} at '
            f'{prefix!r}: {explain(result.mismatches)}. {remedy(result.mismatches)}'
        )
    if found.family.norms_are_optional and not found.norms:
        raise CheckpointError(
            f'the checkpoint is of {held} at {prefix!r}, but has no output norms (officially '
            'outnorm0 to outnorm3), without which ours would compute something else.'
        )
    print_log(f"The authors' {held} at {prefix!r} is converted to our names.", logger='current')
    return result


def _fit_known_parts(backbone: SSMBackbone, inside: Mapping[str, Any], everything: bool) -> Fit:
    """Compare a state dict with a backbone; unless ``everything``, ignore names outside the backbone's parts."""
    tensors = {name: value for name, value in inside.items() if isinstance(value, Tensor)}
    if not everything:
        part = re.compile(r'(patch_embed|stages|pyramid|norm\d+)\.')
        tensors = {name: value for name, value in tensors.items() if part.match(name)}
    return fit(backbone, tensors, resize=False)


def _is_resized(mismatch: Mismatch) -> bool:
    """Return whether loading resizes the tensor: a position embedding (1, h, w, C) of another grid."""
    found, expected = mismatch.found or (), mismatch.expected or ()
    return mismatch.name == 'patch_embed.pos_embed' and len(found) == len(expected) == 4 and found[::3] == expected[::3]


def _refuse(backbone: SSMBackbone, mismatches: list[Mismatch], held: Mapping[str, Any], where: str) -> str:
    name, own = type(backbone).__name__, backbone.state_dict()
    if not own.keys().isdisjoint(held):
        return f'{where} does not fit the {name}: {explain(mismatches)}. {remedy(mismatches)}'
    if next(find_official(held, FAMILIES), None) is not None:
        return f"{where} holds the authors' tensors, by their names. {_OFFICIAL_REMEDY}"
    weights = own_weights(held)
    front = common_prefix(weights, own)
    if front:
        return (
            f'{where} does not fit the {name}: its names begin with {front!r}. Give prefix={front!r} beside the '
            "checkpoint of type='Pretrained'."
        )
    if not own.keys().isdisjoint(weights):
        return (
            f"{where} does not fit the {name}: its tensors lie under 'model', where mmengine does not look. Save "
            "them under 'state_dict', or alone."
        )
    return (
        f"{where} holds none of the {name}'s tensors, so that nothing of it would be loaded. Name a checkpoint of "
        'this backbone; an official one has to be converted, for a whole model with tools/convert_checkpoint.py '
        "and for a backbone by init_cfg=dict(type='OfficialPretrained', checkpoint=...). Other parts of a model "
        "are loaded without it by PyTorch's load_state_dict(..., strict=False)."
    )


def _mmengine_loads() -> bool:
    """Return whether the caller is mmengine's ``load_state_dict`` or PyTorch's; both call the modules alike."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get('__name__')
        if module in ('mmengine.runner.checkpoint', 'torch.nn.modules.module'):
            return module == 'mmengine.runner.checkpoint'
        frame = frame.f_back
    return False


def _let_mmengine_read_safetensors() -> None:
    from mmengine.runner import CheckpointLoader

    def load(filename: str, map_location: Any = None) -> dict[str, Any]:
        return read_checkpoint(filename)

    # Regular expressions, of which mmengine takes the last in alphabetical order that matches.
    schemes = (r'https?://\S+\.safetensors', r'(?!\w+:).*\.safetensors$')
    CheckpointLoader.register_scheme(schemes, load, force=True)


if INSTALLED:
    _let_mmengine_read_safetensors()
SSMBackbone.before_loading = convert_or_refuse
revise_loaded_names(revise_names)
