"""Findings of the report."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Line:
    """One finding.

    Attributes:
        label: Subject of the finding.
        text: The finding.
        remedy: What to do, if there is a remedy.
        broken: Whether it prevents a config from working.
    """

    label: str
    text: str
    remedy: str = ''
    broken: bool = False


def short(error: BaseException | str, width: int = 300) -> str:
    """Format an error in one line: its type and the first line of its message."""
    if isinstance(error, BaseException):
        said = str(error).strip()
        error = f'{type(error).__name__}: {said}' if said else type(error).__name__
    line = ' '.join(error.split())
    return line if len(line) <= width else f'{line[: width - 3]}...'
