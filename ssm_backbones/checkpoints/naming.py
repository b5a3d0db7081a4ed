"""Name rules between official and our tensors, in both directions, with the shapes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]


def same(shape: Shape) -> Shape:
    """Return the shape unchanged: most tensors have the same one under both names."""
    return shape


def merged(shape: Shape) -> Shape:
    """Merge the first two dimensions, (4, E, ...) -> (4E, ...)."""
    return (shape[0] * shape[1], *shape[2:])


def by_route(shape: Shape) -> Shape:
    """Split the first dimension by the four routes, (4F, ...) -> (4, F, ...)."""
    return (4, shape[0] // 4, *shape[1:])


class Rule(NamedTuple):
    """The official and our name of a tensor or module, and the official shape as a function of ours.

    ``{s}`` is the number of a stage and ``{b}`` that of a block. Both shapes have the same elements in the same order.
    """

    official: str
    ours: str
    official_shape: Callable[[Shape], Shape] = same


class Naming:
    """Compiled rules. The first rule that matches a name applies."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        self._to_ours = [(_pattern(rule.official), _template(rule.ours)) for rule in rules]
        self._to_official = [(_pattern(rule.ours), _template(rule.official), rule.official_shape) for rule in rules]

    def ours(self, official: str) -> str | None:
        """Return our name of an official one, or None if no rule matches."""
        for pattern, template in self._to_ours:
            match = pattern.fullmatch(official)
            if match:
                return match.expand(template)
        return None

    def official(self, ours: str) -> tuple[str, Callable[[Shape], Shape]] | None:
        """Return the official name of ours and its shape as a function of ours, or None if no rule matches."""
        for pattern, template, official_shape in self._to_official:
            match = pattern.fullmatch(ours)
            if match:
                return match.expand(template), official_shape
        return None


def official_layout(naming: Naming, shapes: Shapes, prefix: str = '') -> dict[str, tuple[str, Shape]]:
    """Map official names to our names and the official shapes.

    Args:
        naming: The rules.
        shapes: Our names and shapes.
        prefix: Prefix of the official names.

    Raises:
        LookupError: If no rule matches one of our names.
    """
    layout = {}
    for ours, shape in shapes.items():
        official = naming.official(ours)
        if official is None:
            raise LookupError(f'no rule gives {ours} an official name')
        name, official_shape = official
        layout[prefix + name] = (ours, official_shape(shape))
    return layout


def _pattern(name: str) -> re.Pattern[str]:
    escaped = re.escape(name).replace(r'\{s\}', r'(?P<s>\d+)').replace(r'\{b\}', r'(?P<b>\d+)')
    return re.compile(escaped + r'(?P<rest>(?:\.\w+)*)', re.ASCII)


def _template(name: str) -> str:
    return name.replace('{s}', r'\g<s>').replace('{b}', r'\g<b>') + r'\g<rest>'
