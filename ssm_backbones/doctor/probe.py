"""What runs in a process of its own: importing the host libraries, each as far as a config's model needs it.

``python -c 'from ssm_backbones.doctor.probe import main; main()' NAME...`` writes a line of JSON for each; a name that
has none is the one whose import ended the process.
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
    """Probe what the arguments name. What the libraries print goes to the error stream."""
    answers = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)
    for name in sys.argv[1:]:
        print(json.dumps({'name': name, **probe(name)}), file=answers, flush=True)


def probe(name: str) -> dict[str, Any]:
    """Import one library: its ``version``, and ``error`` and ``doing`` where that fails."""
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
        # An assertion or an exit is what is looked for here.
        found.update(error=short(error), doing=doing)
    return found


def _library_mismatch() -> str | None:
    """Why torchvision's compiled library does not load, if so; then it imports by the patch alone."""
    library = compat._find_torchvision_library()
    if library is None:
        return None
    try:
        importlib.import_module('torch').ops.load_library(library)
    except OSError as error:
        return short(str(error.__cause__ or error))
    return None


def _missing_ops() -> str | None:
    """Why mmcv's compiled operators do not load, if so. mmpretrain does without them."""
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
