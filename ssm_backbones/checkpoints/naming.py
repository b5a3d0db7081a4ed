"""Two names for each tensor: rules that translate both ways, and the shapes that go with them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]


def same(shape: Shape) -> Shape:
    """The shape itself: most tensors have the same one under both names."""
    return shape


def merged(shape: Shape) -> Shape:
    """The first two dimensions as one, (4, E, ...) -> (4E, ...)."""
    return (shape[0] * shape[1], *shape[2:])


def by_route(shape: Shape) -> Shape:
    """The first dimension split by the four routes, (4F, ...) -> (4, F, ...)."""
    return (4, shape[0] // 4, *shape[1:])


class Rule(NamedTuple):
    """An official name and ours, of a tensor or of a module, and the official shape as a function of ours.

    ``{s}`` stands for the number of a stage and ``{b}`` for that of a block. Both shapes hold the same elements in the
    same order.
    """

    official: str
    ours: str
    official_shape: Callable[[Shape], Shape] = same


class Naming:
    """Rules, ready to translate. The first rule that fits a name holds."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        self._to_ours = [(_pattern(rule.official), _template(rule.ours)) for rule in rules]
        self._to_official = [(_pattern(rule.ours), _template(rule.official), rule.official_shape) for rule in rules]

    def ours(self, official: str) -> str | None:
        """Our name of an official one, or None if no rule fits."""
        for pattern, template in self._to_ours:
            match = pattern.fullmatch(official)
            if match:
                return match.expand(template)
        return None

    def official(self, ours: str) -> tuple[str, Callable[[Shape], Shape]] | None:
        """The official name of one of ours, and its shape as a function of ours; None if no rule fits."""
        for pattern, template, official_shape in self._to_official:
            match = pattern.fullmatch(ours)
            if match:
                return match.expand(template), official_shape
        return None


def official_layout(naming: Naming, shapes: Shapes, prefix: str = '') -> dict[str, tuple[str, Shape]]:
    """For each official name that tensors of ours have: our name and the official shape.

    Args:
        naming: the rules.
        shapes: our names and shapes.
        prefix: what to put before the official names.
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
