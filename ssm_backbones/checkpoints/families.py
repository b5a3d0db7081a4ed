"""Interface of the families of models with official checkpoints."""

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

    A *dialect* is a dictionary of plain values that selects the naming rules of one file.
    Backbone names below are relative to the backbone, head names to the whole model; ours always start with ``head.``.
    """

    name: ClassVar[str]
    model: ClassVar[type[SSMBackbone]]
    main_key: ClassVar[str]
    """Key of the tensors in official classification checkpoints."""
    classifier_prefix: ClassVar[str]
    """Prefix of the backbone's names in official classification checkpoints."""
    norms_are_optional: ClassVar[bool]
    """Whether output norms of our backbone may be missing from official files."""
    last_layer: ClassVar[str]
    """Our name of the classifier's last layer."""
    official_mark: ClassVar[re.Pattern[str]]
    """Matches the end of a name that every block of the family (of its first stage, at least) has."""

    @abstractmethod
    def is_ours(self, shapes: Shapes) -> bool:
        """Return whether these are the tensors of our backbone of this family."""

    @abstractmethod
    def dialect(self, official: Iterable[str]) -> dict[str, Any]:
        """Return the dialect of a file, from its backbone's official names."""

    @abstractmethod
    def default_dialect(self, settings: Mapping[str, Any], classifier: bool) -> dict[str, Any]:
        """Return the dialect of the authors' published models of these settings."""

    @abstractmethod
    def naming(self, dialect: Mapping[str, Any]) -> Naming:
        """Return the rules for the backbone's names."""

    @abstractmethod
    def head_naming(self, dialect: Mapping[str, Any]) -> Naming:
        """Return the rules for the names of the classification head."""

    @abstractmethod
    def settings(self, shapes: Shapes) -> dict[str, Any]:
        """Return the arch dict that matches tensors with our names; the shapes may be official.

        Raises:
            KeyError: If a tensor that determines the arch is missing. Its argument is our name of the tensor.
        """

    @abstractmethod
    def head_shapes(self, settings: Mapping[str, Any], num_classes: int) -> dict[str, Shape]:
        """Return our names and shapes of the classification head."""

    @abstractmethod
    def stem(self, names: Iterable[str]) -> str:
        """Return our name of the stem's weight, whose input is the image."""

    def arch(self, settings: Mapping[str, Any]) -> str | None:
        """Return the name of the arch with these settings, or None."""
        archs: dict[str, dict[str, Any]] = self.model.ARCHS
        return next((name for name, row in archs.items() if row == settings), None)

    def backbone_shapes(self, settings: Mapping[str, Any], in_channels: int) -> dict[str, Shape]:
        """Return our names and shapes of the whole backbone, with the output norms of all stages.

        Raises:
            ValueError: If the settings are invalid.
        """
        options: dict[str, Any] = dict(
            arch=dict(settings), in_channels=max(in_channels, 1), out_indices=tuple(range(len(settings['depths'])))
        )
        with torch.device('meta'):
            model = self.model(**options)
        return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def leading(shape: Shape) -> int:
    """Return the first dimension, or 0 for a scalar."""
    return shape[0] if shape else 0


def count(names: Iterable[str], pattern: str) -> int:
    """Return one more than the greatest number that ``pattern`` captures at a name's start, or 0 without a match."""
    found = (re.match(pattern, name) for name in names)
    return max((int(match[1]) + 1 for match in found if match), default=0)
