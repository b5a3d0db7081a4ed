"""What the check of the data finds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

ERROR, WARNING, NOTE = 'error', 'warning', 'note'
SEVERITIES = (ERROR, WARNING, NOTE)
"""Errors stop a training; warnings are likely mistakes; notes are what the libraries leave out or change silently."""


@dataclass(frozen=True)
class Finding:
    """One kind of trouble in one file.

    Attributes:
        severity: ``'error'``, ``'warning'`` or ``'note'``.
        file: Path of the file or folder, or the config key, where the trouble is.
        id: The first thing concerned, such as ``'annotation 17'``; empty if it is the file or key as a whole.
        value: What is wrong, with the value.
        remedy: What to do about it.
        count: How many things are concerned in the same way, the first included.
    """

    severity: str
    file: str
    id: str
    value: str
    remedy: str
    count: int = 1

    def __str__(self) -> str:
        """Return the finding as one line."""
        where = f'{self.file}, {self.id}' if self.id else self.file
        more = f' ({self.count - 1} more alike)' if self.count > 1 else ''
        return f'{where}: {self.value}{more}. {self.remedy}'


@dataclass
class Findings:
    """Collects findings."""

    found: list[Finding] = field(default_factory=list)

    def add(self, severity: str, file: Any, value: str, remedy: str, id: str = '', count: int = 1) -> None:
        """Add a finding."""
        finding = Finding(severity, _printable(str(file)), _printable(id), _printable(value), remedy, count)
        if finding not in self.found:
            self.found.append(finding)

    def add_all(
        self, severity: str, file: Any, what: Sequence[Any], describe: Callable[[Any], tuple[str, str]], remedy: str
    ) -> None:
        """Add one finding about all of ``what``, if there are any: ``describe`` gives the id and value of the first."""
        if len(what):
            id, value = describe(what[0])
            self.add(severity, file, value, remedy, id, len(what))

    def has_errors(self) -> bool:
        """Return whether there is an error among the findings."""
        return any(finding.severity == ERROR for finding in self.found)

    def ordered(self) -> list[Finding]:
        """Return the findings, errors first."""
        return sorted(self.found, key=lambda finding: SEVERITIES.index(finding.severity))


def _printable(text: str) -> str:
    """Escape what would steer a terminal: names and values are whoever's wrote the annotations."""
    return ''.join(
        letter if letter.isprintable() else letter.encode('unicode_escape', 'backslashreplace').decode('ascii')
        for letter in text
    )
