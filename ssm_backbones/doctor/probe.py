"""Import the host libraries in a separate process, each as far as a config's model needs it.

``python -c 'from ssm_backbones.doctor.probe import main; main()' NAME...`` writes a line of JSON for each name; a
missing line means that the import of that name ended the process.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import ssm_backbones  # noqa: F401 (its patches come first, as in a config)
from ssm_backbones import compat
from ssm_backbones.doctor.line import short

_BOUNDS = (('mmcv_minimum_version', 'mmcv_maximum_version'), ('MMCV_MIN', 'MMCV_MAX'))


def main() -> None:
    """Probe the libraries named by the arguments, with their own output on stderr."""
    answers = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)
    for name in sys.argv[1:]:
        print(json.dumps({'name': name, **probe(name)}), file=answers, flush=True)


def probe(name: str) -> dict[str, Any]:
    """Import one library and return its ``version``, and ``error`` and ``doing`` on failure."""
    found: dict[str, Any] = {}
    doing = f'import {name}'
    try:
        module = importlib.import_module(name)
        found['version'] = getattr(module, '__version__', None)
        if name == 'torchvision':
            found['note'] = _library_mismatch()
        elif name == 'mmcv':
            found['note'] = _missing_ops()
        else:
            found['bounds'] = next(
                (
                    (getattr(module, low), getattr(module, high))
                    for low, high in _BOUNDS
                    if hasattr(module, low) and hasattr(module, high)
                ),
                None,
            )
            for part in ('models', 'datasets'):
                doing = f'import {name}.{part}'
                importlib.import_module(f'{name}.{part}')
            doing = f"_base_ = '{name}::_base_/default_runtime.py'"
            _inherit(doing)
    except BaseException as error:
        # Assertions and exits are caught too.
        found.update(error=short(error), doing=doing)
    return found


def _library_mismatch() -> str | None:
    """Return why torchvision's compiled library does not load, if so; it then imports only by the patch."""
    library = compat.find_torchvision_library()
    if library is None:
        return None
    try:
        importlib.import_module('torch').ops.load_library(library)
    except OSError as error:
        return short(str(error.__cause__ or error))
    return None


def _missing_ops() -> str | None:
    """Return why mmcv's compiled operators do not load, if so. mmpretrain does not need them."""
    try:
        importlib.import_module('mmcv.ops')
    except Exception as error:
        return short(error)
    return None


def _inherit(text: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, 'config.py')
        path.write_text(text, encoding='utf-8')
        importlib.import_module('mmengine.config').Config.fromfile(path)
