"""Errors of the command lines, and hints for their messages."""

from __future__ import annotations

import difflib
from collections.abc import Sequence


class CommandError(RuntimeError):
    """An error that a command line prints without a traceback: its message names the cause and the remedy."""


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """Return ``' (did you mean ...?)'`` with the known name closest to a misspelt one, or ``''`` if none is close."""
    close = difflib.get_close_matches(name, known, n=1)
    return f' (did you mean {close[0]!r}?)' if close else ''
