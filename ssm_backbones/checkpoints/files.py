"""Read checkpoints without running their code, and write them atomically."""

from __future__ import annotations

import argparse
import contextlib
import os
import pickle
import pickletools
import urllib.parse
import urllib.request
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ssm_backbones.checkpoints.download import download, is_url
from ssm_backbones.checkpoints.errors import CheckpointError
from ssm_backbones.utils.files import atomic_file
from ssm_backbones.utils.torch_compat import allow_in_checkpoints, allowed_in_checkpoints, load_weights

# Trainers derived from Swin and timm store their settings with the weights. Neither class runs code on loading; CfgNode
# is read as a plain dict. They are allowed permanently, because loads can be nested.
allow_in_checkpoints({'yacs.config.CfgNode': OrderedDict, 'argparse.Namespace': argparse.Namespace})
_AGAIN = 'Get the file again.'
_PICKLES = 5
# Raised by programming errors. Damaged bytes can raise them too, but not in an archive with valid checksums.
_FAULTS = (AttributeError, TypeError, NameError, ImportError, NotImplementedError, MemoryError)


def read_checkpoint(source: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint file with ``weights_only=True``, or a safetensors file, onto the CPU.

    Args:
        source: A path, a file URL, or an http, https or ftp URL, which is downloaded once into ``torch.hub``'s folder.

    Raises:
        CheckpointError: If the file does not exist, is truncated or not a checkpoint, or contains anything but tensors
            and plain Python values.
    """
    name = str(source)
    if name.startswith('file://'):
        return _read(Path(urllib.request.url2pathname(urllib.parse.urlsplit(name).path)), name)
    if not is_url(name):
        return _read(Path(name).expanduser(), name)
    path = download(name)
    try:
        return _read(path, name)
    except CheckpointError:
        # So that the next attempt downloads it again.
        path.unlink(missing_ok=True)
        raise


def check_destination(path: str | os.PathLike[str], overwrite: bool = False) -> None:
    """Check that a destination can be written, before any work is done.

    Raises:
        CheckpointError: If the path is a folder, or exists and ``overwrite`` is False.
    """
    if Path(path).expanduser().is_dir():
        raise CheckpointError(f'{path} is a folder; name a file.')
    if Path(path).expanduser().exists() and not overwrite:
        raise CheckpointError(f'{path} exists; remove it, choose another name, or allow overwriting.')


def write_checkpoint(checkpoint: Mapping[str, Any], path: str | os.PathLike[str], overwrite: bool = False) -> None:
    """Write a checkpoint atomically.

    Raises:
        CheckpointError: If the destination exists and ``overwrite`` is False, or cannot be written.
    """
    check_destination(path, overwrite)
    destination = Path(path).expanduser().resolve()
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(destination) as temporary:
            torch.save(dict(checkpoint), temporary)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f'{path} cannot be written: {error}') from error


def _read(path: Path, name: str) -> dict[str, Any]:
    if not path.exists():
        raise CheckpointError(f'{name} does not exist.')
    if not path.is_file():
        raise CheckpointError(f'{name} is not a file.')
    try:
        with open(path, 'rb') as file:
            start = file.read(512)
    except OSError as error:
        raise CheckpointError(f'{name} cannot be read: {error}') from error
    if _is_safetensors(start):
        return _read_safetensors(path, name)
    _check_start(start, name)
    try:
        _check_archive(path, name)
        checkpoint = load_weights(path)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        raise CheckpointError(_explain_refusal(path, name)) from error
    except Exception as error:
        if isinstance(error, _FAULTS) and zipfile.is_zipfile(path):
            raise
        # Damaged files raise whatever their bytes happen to mean: EOFError, OSError, RuntimeError, KeyError...
        reason = str(error).partition('\n')[0].partition('. ')[0] or type(error).__name__
        raise CheckpointError(
            f'{name} is truncated, damaged or no PyTorch checkpoint ({path.stat().st_size} bytes): {reason}. {_AGAIN}'
        ) from error
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f'{name} holds a {type(checkpoint).__name__}, not a dictionary of tensors.')
    return checkpoint


def _is_safetensors(start: bytes) -> bool:
    # The length of a header in JSON, and the header.
    return start[8:9] == b'{' and 2 <= int.from_bytes(start[:8], 'little') <= 100_000_000


def _read_safetensors(path: Path, name: str) -> dict[str, Any]:
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f'{name} is truncated or damaged ({path.stat().st_size} bytes): {error}. {_AGAIN}'
        ) from error
    if not tensors:
        raise CheckpointError(f'{name} holds no tensors.')
    return tensors


def _check_start(start: bytes, name: str) -> None:
    if not start:
        raise CheckpointError(f'{name} is empty. {_AGAIN}')
    text = start.removeprefix(b'\xef\xbb\xbf').lstrip().lower()
    if text.startswith(b'<'):
        raise CheckpointError(
            f'{name} is a web page, not a checkpoint: what was saved is the page that led to the '
            'file, or an error page. Download the file itself.'
        )
    if text.startswith(b'version https://git-lfs'):
        raise CheckpointError(f'{name} is the pointer of a Git LFS file, not the file. Fetch it with git lfs pull.')
    if not start.startswith((b'PK', b'\x80')):
        raise CheckpointError(
            f'{name} is neither a PyTorch checkpoint nor a safetensors file: it starts with {start[:16]!r}.'
        )


def _check_archive(path: Path, name: str) -> None:
    if zipfile.is_zipfile(path):
        # torch.load does not verify the archive's checksums.
        try:
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
        except NotImplementedError as error:
            # A method of compression or a version that no checkpoint has.
            raise CheckpointError(f'{name} is damaged: {error}. {_AGAIN}') from error
        if damaged is not None:
            raise CheckpointError(f'{name} is damaged: the checksum of {damaged} in it is wrong. {_AGAIN}')


def _explain_refusal(path: Path, name: str) -> str:
    allowed = allowed_in_checkpoints()
    asked = next(
        (
            found
            for found in _globals_in(path)
            if found not in allowed and not found.startswith(('torch.', 'collections.'))
        ),
        None,
    )
    if asked is not None:
        return (
            f'{name} is refused: reading it would run or build {asked}, and weights alone need no code '
            '(it was read with weights_only=True, and nothing of it was loaded).'
        )
    return f'{name} is refused: it holds more than weights, or is damaged; nothing of it was loaded.'


def _globals_in(path: Path) -> Iterator[str]:
    """Yield the classes and functions that a checkpoint's pickles refer to, as far as they can be parsed."""
    with contextlib.ExitStack() as stack:
        if zipfile.is_zipfile(path):
            archive = stack.enter_context(zipfile.ZipFile(path))
            files = [
                stack.enter_context(archive.open(entry)) for entry in archive.namelist() if entry.endswith('data.pkl')
            ]
        else:
            # The legacy format is several pickles in a row, followed by the numbers.
            files = [stack.enter_context(open(path, 'rb'))] * _PICKLES
        for file in files:
            strings: list[str] = []
            try:
                for opcode, argument, _ in pickletools.genops(file):
                    if opcode.name == 'GLOBAL':
                        yield str(argument).replace(' ', '.')
                    elif opcode.name == 'STACK_GLOBAL':
                        yield '.'.join(strings[-2:])
                    elif isinstance(argument, str):
                        strings.append(argument)
            except Exception:  # whatever damaged bytes raise
                return
