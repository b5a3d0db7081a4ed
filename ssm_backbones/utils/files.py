"""Atomic writes: a file is written beside its destination under a temporary name, then renamed."""

import errno
import fcntl
import hashlib
import logging
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from safetensors import SafetensorError

from ssm_backbones.utils.errors import CommandError

logger = logging.getLogger(__name__)

PARTIAL_NAME = re.compile(r'\.[0-9a-f]{32}\.part')
"""Pattern of the temporary names of :func:`atomic_file`; a killed process leaves such a file behind."""


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Create an empty temporary file to write to, and rename it to ``path`` on success.

    An existing file of that name is replaced, and so is the file that a link of that name leads to. If the block fails,
    the temporary file is removed. It has the default permissions of a new file and is created at once, so that an
    unwritable folder is noticed before the work.

    Raises:
        OSError: If the file cannot be written, or is a folder or a device such as ``/dev/null``. The error names
            ``path``.
    """
    # Renaming would replace the link itself, and even a device.
    path = Path(os.path.realpath(path)) if os.path.islink(path) else Path(path)
    if path.exists() and not path.is_file():
        kind = errno.EISDIR if path.is_dir() else errno.EINVAL
        raise OSError(kind, 'Is a directory' if path.is_dir() else 'Is no regular file', str(path))
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
    """Write a UTF-8 text file atomically.

    Raises:
        OSError: If the file cannot be written. The error names ``path``.
    """
    with atomic_file(path) as partial:
        partial.write_text(text, encoding='utf-8')


def file_name(id: str) -> str:
    """Return the name of an image's file below ``features``: its id with characters unsafe for file systems quoted."""
    parts = [quote(part, safe=" ()[]{}+,=@~!$&'") for part in id.split('/')]
    # A name may have 255 bytes, and no part may be '.' or '..'.
    parts = [part.replace('.', '%2E') if part.strip('.') == '' else part for part in parts]
    long = max(len(part) for part in parts) > 200 or '' in parts
    return f'id-{hashlib.sha256(id.encode()).hexdigest()}' if long else '/'.join(parts)


@contextmanager
def locked(folder: str | os.PathLike[str], what: str = 'export', parameter: str = 'out') -> Iterator[None]:
    """Hold an exclusive lock on a folder, which is created.

    The lock is this process's alone, not that of children that it forks: it ends with this process, however that ends.

    Args:
        folder: The folder.
        what: What writes there, for messages.
        parameter: What names the folder, for messages.

    Raises:
        CommandError: If another process holds the lock, or the folder cannot be written.

    A file system without locks is used without one, with a warning.
    """
    with writing(folder, parameter):
        Path(folder).mkdir(parents=True, exist_ok=True)
        lock = open(Path(folder, '.lock'), 'w')
    with lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise CommandError(f'{parameter} {folder}: another {what} is writing there.') from None
        except OSError as error:
            # Some network file systems have no locks.
            logger.warning('%s %s cannot be locked (%s): start no other %s there.', parameter, folder, error, what)
        yield


@contextmanager
def writing(path: str | os.PathLike[str], parameter: str = 'out') -> Iterator[None]:
    """Convert write errors to a :class:`CommandError` that names the folder or file."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CommandError(f'{parameter} {path} cannot be written: {error}') from error
