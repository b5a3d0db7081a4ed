"""Files that are there whole or not at all: written beside their place under another name, then renamed."""

import fcntl
import hashlib
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from safetensors import SafetensorError

from ssm_backbones.utils.errors import CommandError

PARTIAL_NAME = re.compile(r'\.[0-9a-f]{32}\.part')
"""What :func:`atomic_file` calls a file that is being written; a process that was killed leaves it behind."""


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
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


def write_atomic(path: str | os.PathLike[str], text: str) -> None:
    """Write a text, UTF-8, as a whole file.

    Raises:
        OSError: As of :func:`atomic_file`.
    """
    with atomic_file(path) as partial:
        partial.write_text(text, encoding='utf-8')


def file_name(id: str) -> str:
    """Make the name of an image's file below ``features``: its id, without what a file system would misunderstand."""
    parts = [quote(part, safe=" ()[]{}+,=@~!$&'") for part in id.split('/')]
    # A name may have 255 bytes, and a part of one must not lead elsewhere.
    parts = [part.replace('.', '%2E') if part.strip('.') == '' else part for part in parts]
    long = max(len(part) for part in parts) > 200 or '' in parts
    return f'id-{hashlib.sha256(id.encode()).hexdigest()}' if long else '/'.join(parts)


@contextmanager
def locked(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Keep other exports out of a folder.

    Raises:
        CommandError: If one is at work there, or the folder cannot be written.
    """
    with writing(folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
        lock = open(Path(folder, '.lock'), 'w')
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CommandError(f'--out {folder}: another export is writing there.') from None
        yield


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn a failure to write into a :class:`CommandError` that names the folder or file."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CommandError(f'--out {path} cannot be written: {error}') from error
