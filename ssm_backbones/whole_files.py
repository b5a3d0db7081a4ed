"""Files that are there whole or not at all: written beside their place under another name, then renamed."""

import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL_NAME = re.compile(r'\.[0-9a-f]{32}\.part')
"""What :func:`whole_file` calls a file that is being written; a process that was killed leaves it behind."""


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """An empty new file to write to instead of ``path``.

    It takes that name if the block succeeds, in place of a file that has it, and is removed otherwise. It has the
    permissions of any new file, and is made at once, so that a folder that cannot be written to shows before the work.

    Raises:
        OSError: If it cannot be written, naming ``path``.
    """
    path = Path(path)
    partial = path.with_name(f'.{uuid.uuid4().hex}.part')
    try:
        partial.touch(exist_ok=False)
        try:
            yield partial
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        if error.filename == str(partial) and error.filename2 is None:
            error.filename = str(path)
        raise


def write_whole(path: str | os.PathLike[str], text: str) -> None:
    """Write a text, UTF-8, as a whole file.

    Raises:
        OSError: As of :func:`whole_file`.
    """
    with whole_file(path) as partial:
        partial.write_text(text, encoding='utf-8')
