"""The error of the command lines."""

from __future__ import annotations


class CommandError(RuntimeError):
    """A command cannot do what it was asked; the message says why and what to do."""
