"""Identify the model in a checkpoint, official or ours, from its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ssm_backbones.checkpoints.differences import compare, explain, shape_text, shapes_of, shorten
from ssm_backbones.checkpoints.families import Family
from ssm_backbones.checkpoints.files import CheckpointError
from ssm_backbones.checkpoints.locate import WeightSet
from ssm_backbones.checkpoints.mamba2d import Mamba2DFamily
from ssm_backbones.checkpoints.naming import Naming, Shape, Shapes, official_layout
from ssm_backbones.checkpoints.vmamba import VMambaFamily

FAMILIES: tuple[Family, ...] = (VMambaFamily(), Mamba2DFamily())
CLASSIFIER, BACKBONE, WHOLE = 'classifier', 'backbone', 'whole model'


@dataclass(frozen=True)
class Identified:
    """A model whose tensors are all identified, with our names and shapes."""

    family: Family
    settings: dict[str, Any]
    """The matching arch dict."""
    kind: str
    """A classifier, a bare backbone, or a whole model (detector, segmentor)."""
    backbone: dict[str, Tensor]
    """Tensors of all stages and of the output norms in the file, by names relative to the backbone."""
    head: dict[str, Tensor]
    """Tensors of the classification head, by names beginning with ``head.``."""
    rest: dict[str, Any]
    """Other entries of a whole model, by their own names."""

    @property
    def stem(self) -> str:
        """Name of the stem's weight, whose input is the image."""
        return self.family.stem(self.backbone)

    @property
    def in_channels(self) -> int:
        """Image channels that the stem expects."""
        return self.backbone[self.stem].shape[1]

    @property
    def norms(self) -> tuple[int, ...]:
        """Stages whose output norms are in the file."""
        stages = range(len(self.settings['depths']))
        return tuple(i for i in stages if f'norm{i}.weight' in self.backbone)


def identify_official(weights: WeightSet, source: str) -> tuple[Identified, dict[str, Any]]:
    """Identify every tensor of an official model and translate it to our names and shapes.

    Args:
        weights: The model's weights.
        source: The file's name, for messages.

    Returns:
        The model, and the dialect of its names (see :class:`Family`).

    Raises:
        CheckpointError: If the tensors do not exactly match an official model.
    """
    family, prefix, held = weights.family, weights.prefix, weights.tensors
    inside, outside = _parted(held, prefix)
    dialect = family.dialect(list(inside))
    naming, head_naming = family.naming(dialect), family.head_naming(dialect)
    found = _translated(inside, naming)
    head = _translated(outside or inside, head_naming) if prefix == family.classifier_prefix else {}
    kind = CLASSIFIER if head else WHOLE if outside else BACKBONE

    try:
        settings = family.settings(shapes_of(found))
    except KeyError as error:
        official = naming.official(error.args[0])
        missing = prefix + official[0] if official else error.args[0]
        raise CheckpointError(
            f'{source} is no complete {family.name}: it lacks {missing}, which tells the variants apart.'
        ) from None
    shapes, head_shapes = _expected(family, settings, kind, found, head, source)
    layout = official_layout(naming, shapes, prefix) | official_layout(head_naming, head_shapes)
    strict = {prefix + name: value for name, value in inside.items()}
    strict |= {name: value for name, value in outside.items() if kind != WHOLE or name.startswith('backbone.')}
    _check(strict, {name: shape for name, (_, shape) in layout.items()}, source, describe(family, settings))

    backbone, converted_head = {}, {}
    for name, tensor in strict.items():
        ours = layout[name][0]
        if ours in shapes:
            backbone[ours] = tensor.detach().reshape(shapes[ours])
        else:
            converted_head[ours] = tensor.detach().reshape(head_shapes[ours])
    return Identified(family, settings, kind, backbone, converted_head, outside if kind == WHOLE else {}), dialect


def identify_ours(held: Mapping[str, Any], source: str) -> Identified:
    """Identify every tensor of a model of ours: a bare backbone, or ``backbone.*`` in a whole model.

    Args:
        held: The model's tensors by name.
        source: The file's name, for messages.

    Raises:
        CheckpointError: If the tensors do not exactly match a model of a family with official checkpoints.
    """
    prefix = 'backbone.' if any(name.startswith('backbone.') for name in held) else ''
    inside, outside = _parted(held, prefix)
    family = next((family for family in FAMILIES if family.is_ours(shapes_of(inside))), None)
    if family is None:
        names = ' and '.join(family.name for family in FAMILIES)
        raise CheckpointError(
            f'{source} is no checkpoint of ours of a family with official names, {names}. '
            f'Its names begin with {shorten(list(held), ", ")}.'
        )
    try:
        settings = family.settings(shapes_of(inside))
    except KeyError as error:
        raise CheckpointError(
            f'{source} is no complete {family.name}: it lacks {prefix}{error.args[0]}, which tells the variants apart.'
        ) from None
    head_names = family.head_shapes(settings, 1)
    kind = CLASSIFIER if any(name in head_names for name in outside) else WHOLE if outside else BACKBONE
    head = outside if kind == CLASSIFIER else {}
    shapes, head_shapes = _expected(family, settings, kind, inside, head, source)
    _check({**inside, **head}, {**shapes, **head_shapes}, source, describe(family, settings))
    return Identified(family, settings, kind, inside, head, outside if kind == WHOLE else {})


def describe(family: Family, settings: Mapping[str, Any]) -> str:
    """Format the family and the matching arch as in a config."""
    return f'{family.name}, arch={family.arch(settings) or dict(settings)!r}'


def _parted(held: Mapping[str, Any], prefix: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split the entries with a prefix, which is removed, from the others."""
    inside = {name.removeprefix(prefix): value for name, value in held.items() if name.startswith(prefix)}
    return inside, {name: value for name, value in held.items() if not name.startswith(prefix)}


def _translated(held: Mapping[str, Any], naming: Naming) -> dict[str, Any]:
    """Return the entries that the rules match, by our names."""
    return {ours: value for name, value in held.items() if (ours := naming.ours(name)) is not None}


def _expected(
    family: Family, settings: dict[str, Any], kind: str, found: Mapping[str, Any], head: Mapping[str, Any], source: str
) -> tuple[dict[str, Shape], dict[str, Shape]]:
    """Return our names and shapes that the backbone and the classification head must have."""
    in_channels = _dimension(found.get(family.stem(found)), 1)
    try:
        shapes = family.backbone_shapes(settings, in_channels)
    except ValueError as error:
        raise CheckpointError(
            f'{source} looks like a {family.name}, but like none that can be built, {settings}: {error}.'
        ) from error
    if family.norms_are_optional:
        norms = {f'norm{i}.' for i in range(len(settings['depths']))}
        present = {norm for norm in norms if any(name.startswith(norm) for name in found)}
        if kind == CLASSIFIER:
            present.add(f'norm{len(norms) - 1}.')
        elif kind == WHOLE and not present:
            raise CheckpointError(
                f'{source}: its backbone, {describe(family, settings)}, has no output norms '
                '(officially outnorm0 to outnorm3), without which ours would compute something else.'
            )
        shapes = {name: shape for name, shape in shapes.items() if not name.startswith(tuple(norms - present))}
    if kind != CLASSIFIER:
        return shapes, {}
    # The number of classes is taken from the last layer's weight or bias, whichever is present.
    num_classes = max(_dimension(head.get(f'{family.last_layer}.{part}'), 0) for part in ('weight', 'bias'))
    return shapes, family.head_shapes(settings, num_classes)


def _dimension(tensor: Any, dimension: int) -> int:
    """Return a dimension of a tensor, or 0 if it does not exist."""
    return tensor.shape[dimension] if isinstance(tensor, Tensor) and tensor.ndim > dimension else 0


def _check(found: Mapping[str, Any], expected: Shapes, source: str, model: str) -> None:
    mismatches = compare(shapes_of(found), expected)
    # Entries that are not tensors count as missing in the comparison.
    for name in found:
        fault = _fault(found[name])
        if fault and name in expected:
            raise CheckpointError(
                f'{source} is not exactly {model}: {name} is {fault}, expected a tensor '
                f'{shape_text(expected[name])} of floating-point numbers.'
            )
    if mismatches:
        raise CheckpointError(f'{source} is not exactly {model}: {explain(mismatches)}.')


def _fault(value: Any) -> str | None:
    if not isinstance(value, Tensor):
        return f'a {type(value).__name__}'
    return None if value.is_floating_point() else f'of {value.dtype}'
