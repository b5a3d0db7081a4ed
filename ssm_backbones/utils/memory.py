"""Lack of memory, in words that say what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ssm_backbones.utils.errors import CommandError
from ssm_backbones.utils.torch_compat import OutOfMemoryError


@contextmanager
def explain_lack_of_memory(what: str, remedy: str) -> Iterator[None]:
    """Convert errors of insufficient memory, a GPU's or not, to a :class:`CommandError`.

    Args:
        what: What needs the memory: the beginning of the message, before "does not fit into memory".
        remedy: What to do about it: the end of the message.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # Without a GPU PyTorch raises a plain RuntimeError.
        if not isinstance(error, (MemoryError, OutOfMemoryError)) and 'you tried to allocate' not in str(error):
            raise
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CommandError(f'{what} does not fit into memory ({said}); {remedy}.') from error
