"""What the page is made of."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Line:
    """One finding.

    Attributes:
        label: What it is about.
        text: What was found.
        remedy: What to do, if anything can be.
        broken: Whether it keeps a config from working.
    """

    label: str
    text: str
    remedy: str = ''
    broken: bool = False


def short(error: BaseException | str, width: int = 300) -> str:
    """An error in one line: its type and what it says first."""
    if isinstance(error, BaseException):
        said = str(error).strip()
        error = f'{type(error).__name__}: {said}' if said else type(error).__name__
    line = ' '.join(error.split())
    return line if len(line) <= width else f'{line[: width - 3]}...'
