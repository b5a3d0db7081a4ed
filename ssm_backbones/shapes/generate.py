"""Generate the shapes data set on disk, atomically and only once."""

from __future__ import annotations

import contextlib
import fcntl
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ssm_backbones.shapes.options import ShapesOptions
from ssm_backbones.shapes.writers import WRITERS

FORMATS: tuple[str, ...] = tuple(WRITERS)
"""Names of the formats, which are also the folders below the root."""

VERSION = 1
"""Increased whenever the same options give other files, so that older data sets are regenerated."""

MANIFEST = 'manifest.json'


def make_shapes(
    root: str | Path,
    options: ShapesOptions | None = None,
    formats: Sequence[str] = FORMATS,
    overwrite: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, bool]:
    """Generate the shapes data set in the given formats below `root`, unless it exists.

    Each format is written to a hidden folder and renamed when complete. A format that exists with the same options is
    kept. A second process waits for the first.

    Args:
        root: Folder of the formats' folders; created if missing.
        options: Options of the data set; the defaults if None.
        formats: Some of `FORMATS`.
        overwrite: Replace existing formats, also those generated with other options.
        report: Called with a line on the progress.

    Returns:
        For each format, whether it was written (False if it existed).

    Raises:
        ValueError: If no format is given, or an unknown one.
        FileExistsError: If a format's folder has other content, or was generated with other options.
        OSError: If the files cannot be written.
    """
    root = Path(root)
    options = options or ShapesOptions()
    _check_formats(formats)
    if root.exists() and not root.is_dir():
        raise FileExistsError(f'{root} is a file; name a folder')
    root.mkdir(parents=True, exist_ok=True)
    with _locked(root / '.lock', report):
        # All are looked at before one is written.
        missing = {name: overwrite or not _is_complete(root / name, options) for name in formats}
        for name in formats:
            if overwrite:
                _check_ours(root / name)
        for name, wanted in missing.items():
            if wanted:
                _write(root / name, options, report)
            else:
                report(f'{root / name}: complete already')
    return missing


def _check_formats(formats: Sequence[str]) -> None:
    known = ', '.join(FORMATS)
    if isinstance(formats, str) or not formats:
        raise ValueError(f'formats has to be a list of at least one of {known}, not {formats!r}')
    for name in formats:
        if name not in WRITERS:
            raise ValueError(f'unknown format {name!r}; known are {known}')


@contextlib.contextmanager
def _locked(path: Path, report: Callable[[str], None]) -> Iterator[None]:
    with path.open('w') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report(f'{path.parent}: waiting for another process that is writing there')
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _write(target: Path, options: ShapesOptions, report: Callable[[str], None]) -> None:
    partial, old = (target.with_name(f'.{target.name}.{suffix}') for suffix in ('partial', 'old'))
    # Under the lock, what carries these names was left by a run that was killed.
    for leftover in (partial, old):
        if leftover.exists():
            shutil.rmtree(leftover)
    report(f'{target}: writing {options.train} + {options.val} images')
    started = time.monotonic()
    partial.mkdir()
    try:
        WRITERS[target.name](partial, options)
        manifest = {**_identity(target.name, options), 'files': _count_files(partial)}
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=2) + '\n', encoding='utf-8')
        if target.exists():
            target.rename(old)
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if old.exists():
        shutil.rmtree(old)
    report(f'{target}: complete after {time.monotonic() - started:.1f} s')


def _is_complete(target: Path, options: ShapesOptions) -> bool:
    manifest = _check_ours(target)
    if manifest is None:
        return False
    wanted = _identity(target.name, options)
    differences = [
        f'{key} is {manifest.get(key)}, asked for {value}'
        for key, value in wanted.items()
        if manifest.get(key) != value
    ]
    remedy = 'remove it, replace it by tools/make_shapes.py --overwrite (overwrite=True), or use another folder'
    if differences:
        raise FileExistsError(f'{target} was made with other options: {"; ".join(differences)}; {remedy}')
    found = _count_files(target) - 1
    if found != manifest.get('files'):
        raise FileExistsError(f'{target} is damaged: {found} files instead of {manifest.get("files")}; {remedy}')
    return True


def _check_ours(target: Path) -> dict[str, Any] | None:
    # The manifest of what was made here, None where nothing is; anything else is not ours to touch.
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return None
    manifest: Any = None
    with contextlib.suppress(FileNotFoundError, NotADirectoryError, ValueError):
        manifest = json.loads((target / MANIFEST).read_text(encoding='utf-8'))
    if not isinstance(manifest, dict) or manifest.get('generator') != __name__:
        raise FileExistsError(f'{target} was not made by this generator and is left alone; name another folder')
    return manifest


def _identity(name: str, options: ShapesOptions) -> dict[str, Any]:
    return {'generator': __name__, 'version': VERSION, 'format': name, **options.as_json()}


def _count_files(folder: Path) -> int:
    return sum(1 for path in folder.rglob('*') if path.is_file())
