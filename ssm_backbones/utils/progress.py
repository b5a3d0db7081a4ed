"""A progress bar on stderr."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def progress(action: str, total: int, *, disable: bool = False) -> Iterator[Callable[[float], None]]:
    """Show a progress bar with the time that remains; yield a function that advances it by a number of items."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(action), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(file=sys.stderr), disable=disable or not total) as bar:
        task = bar.add_task(action, total=total)
        yield lambda count: bar.advance(task, count)
