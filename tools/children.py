"""Ending whatever a tool has started when the tool itself is ended."""

import os
import signal
from pathlib import Path
from typing import Any


def end_children_on_sigterm() -> None:
    """On SIGTERM, end the processes that this one has started, and those that they have, and then this one.

    Ctrl-C reaches them all from the terminal, but SIGTERM only one. Where there is no /proc, this one alone ends.
    """
    signal.signal(signal.SIGTERM, _end)


def _end(number: int, frame: Any) -> None:
    for child in _descendants(os.getpid()):
        try:
            os.kill(child, signal.SIGTERM)
        except ProcessLookupError:
            pass
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGTERM)


def _descendants(process: int) -> list[int]:
    """Return the processes below one, the nearest first."""
    found = [process]
    for parent in found:
        for listed in Path(f'/proc/{parent}/task').glob('*/children'):
            try:
                found += map(int, listed.read_text().split())
            except OSError:
                continue  # it has ended
    return found[1:]
