"""What the converters know of a family of models, and how they ask for it."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch

from ssm_backbones.backbones.base import SSMBackbone
from ssm_backbones.checkpoints.naming import Naming, Shape, Shapes


class Family(ABC):
    """A family of models with official checkpoints.

    A *dialect* is what the names of one file leave open: a dictionary of plain values from which the rules follow.
    Backbone names below are relative to the backbone, head names to the whole model; ours always start with ``head.``.
    """

    name: ClassVar[str]
    model: ClassVar[type[SSMBackbone]]
    main_key: ClassVar[str]
    """Where the official classification checkpoints keep their tensors."""
    classifier_prefix: ClassVar[str]
    """What stands before the backbone's names in an official classification checkpoint."""
    norms_are_optional: ClassVar[bool]
    """Whether official files may lack output norms that our backbone has."""
    last_layer: ClassVar[str]
    """Our name of the classifier's last layer."""
    official_mark: ClassVar[re.Pattern[str]]
    """Matches the end of a name that every block of the family (of its first stage, at least) has."""

    @abstractmethod
    def is_ours(self, shapes: Shapes) -> bool:
        """Whether these are the tensors of our backbone of this family."""

    @abstractmethod
    def dialect(self, official: Iterable[str]) -> dict[str, Any]:
        """The dialect of a file, from its backbone's official names."""

    @abstractmethod
    def default_dialect(self, settings: Mapping[str, Any], classifier: bool) -> dict[str, Any]:
        """The dialect in which the authors published models of these settings."""

    @abstractmethod
    def naming(self, dialect: Mapping[str, Any]) -> Naming:
        """The rules for the backbone's names."""

    @abstractmethod
    def head_naming(self, dialect: Mapping[str, Any]) -> Naming:
        """The rules for the names of the classification head."""

    @abstractmethod
    def settings(self, shapes: Shapes) -> dict[str, Any]:
        """The arch dict that fits tensors with our names; the shapes may be official.

        Raises:
            KeyError: with our name of a tensor that decides and is missing.
        """

    @abstractmethod
    def head_shapes(self, settings: Mapping[str, Any], num_classes: int) -> dict[str, Shape]:
        """Our names and shapes of the classification head."""

    @abstractmethod
    def stem(self, names: Iterable[str]) -> str:
        """Our name of the weight that sees the image's channels."""

    def arch(self, settings: Mapping[str, Any]) -> str | None:
        """The name of the arch of these settings, if it has one."""
        archs: dict[str, dict[str, Any]] = self.model.ARCHS
        return next((name for name, row in archs.items() if row == settings), None)

    def backbone_shapes(self, settings: Mapping[str, Any], in_channels: int) -> dict[str, Shape]:
        """Our names and shapes of the whole backbone, with the output norms of all stages.

        Raises:
            ValueError: if no such backbone can be built.
        """
        options: dict[str, Any] = dict(
            arch=dict(settings), in_channels=max(in_channels, 1), out_indices=tuple(range(len(settings['depths'])))
        )
        with torch.device('meta'):
            model = self.model(**options)
        return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def leading(shape: Shape) -> int:
    """The first dimension, or 0 of a single number."""
    return shape[0] if shape else 0


def count(names: Iterable[str], pattern: str) -> int:
    """One more than the greatest number that ``pattern`` captures at the start of a name; 0 if it never fits."""
    found = (re.match(pattern, name) for name in names)
    return max((int(match[1]) + 1 for match in found if match), default=0)
