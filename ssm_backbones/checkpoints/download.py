"""Download checkpoints once into ``torch.hub``'s folder; an interrupted download is never used."""

from __future__ import annotations

import fcntl
import hashlib
import http.client
import os
import re
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import torch

from ssm_backbones.checkpoints.errors import CheckpointError
from ssm_backbones.utils.files import PARTIAL_NAME, atomic_file

TIMEOUT_SECONDS = 60
_CHUNK_BYTES = 1 << 20
_NAMED_DIGEST = re.compile(r'[-_](?=[0-9]*[a-f])([0-9a-f]{8,64})\.(?:pth|pt|ckpt|safetensors)$')


def is_url(name: str) -> bool:
    """Return whether a checkpoint is named by a URL that has to be downloaded."""
    return name.startswith(('http://', 'https://', 'ftp://'))


def cache_path(url: str) -> Path:
    """Return where a URL's file is kept: ``<torch.hub.get_dir()>/checkpoints/<digest of the URL>/<file name>``.

    Raises:
        CheckpointError: If the URL names no file.
    """
    parts = urllib.parse.urlsplit(url)
    if parts.fragment:
        raise CheckpointError(f'{url}: what follows # is no part of the address; write a # in a name as %23.')
    name = Path(urllib.parse.unquote(parts.path)).name
    if not name:
        raise CheckpointError(f'{url} names no file.')
    # Releases of different years share file names.
    return Path(torch.hub.get_dir(), 'checkpoints', hashlib.sha256(url.encode()).hexdigest()[:12], name)


def download(url: str) -> Path:
    """Return the path of a URL's file, downloaded unless it is there already.

    A file gets its name only when all of its bytes have arrived, and if their SHA-256 begins with the digits that
    end the URL's file name, as those of OpenMMLab and torchvision do (``resnet50-0676ba61.pth``). In a distributed run,
    the first process downloads and the others wait.

    Raises:
        CheckpointError: If the file cannot be downloaded or stored, or is not the one that its name promises.
            The message says where to put it.
    """
    path = cache_path(url)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.parent / '.lock', 'w') as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                # What a killed process left; the lock is held, so nobody is writing it.
                for entry in path.parent.iterdir():
                    if PARTIAL_NAME.fullmatch(entry.name):
                        entry.unlink()
                with atomic_file(path) as partial:
                    _fetch(url, partial)
                    _check_digest(url, path.name, partial)
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, 'reason', None) or error
        status = f'HTTP status {error.code}, ' if isinstance(error, urllib.error.HTTPError) else ''
        raise CheckpointError(
            f'{url} cannot be downloaded: {status}{reason}. Without a network, get the file elsewhere and put it at '
            f'{path}; or give its path instead of the URL.'
        ) from error
    return path


def _check_digest(url: str, name: str, path: Path) -> None:
    """Compare a file with the digest in its name. Digits alone may be a date as well, and are not compared."""
    named = _NAMED_DIGEST.search(name)
    if named is None:
        return
    found = hashlib.sha256()
    with open(path, 'rb') as file:
        while chunk := file.read(_CHUNK_BYTES):
            found.update(chunk)
    digest = found.hexdigest()
    if not digest.startswith(named[1]):
        raise CheckpointError(
            f'{url}: the name promises a SHA-256 of {named[1]}..., the file has {digest}. It is not kept. If the name '
            "means something else, as mmengine's published_keys does, get the file yourself and give its path."
        )


def _fetch(url: str, destination: Path) -> None:
    """Write the whole content of a URL to a file.

    ``torch.hub.download_url_to_file`` takes a connection that breaks off for the end of the file.
    """
    request = urllib.request.Request(url, headers={'User-Agent': 'ssm_backbones'})
    with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response, open(destination, 'wb') as file:
        length = response.headers.get('Content-Length')
        size = int(length) if length is not None else None
        received = 0
        with torch.hub.tqdm(total=size, disable=not os.isatty(2), unit='B', unit_scale=True, unit_divisor=1024) as bar:
            while chunk := response.read(_CHUNK_BYTES):
                file.write(chunk)
                received += len(chunk)
                bar.update(len(chunk))
    if size is not None and received != size:
        raise OSError(f'the connection broke off after {received} of {size} bytes')
