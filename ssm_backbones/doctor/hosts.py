"""Check torchvision, mmengine and the host libraries: versions, stack, and whether they work."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .line import Line, short

# Distributions by module: OpenMMLab's own and the fork's.
DISTRIBUTIONS = {
    'mmengine': ('mmengine', 'onedl-mmengine'),
    'mmcv': ('mmcv', 'onedl-mmcv'),
    'mmdet': ('mmdet', 'onedl-mmdetection'),
    'mmseg': ('mmsegmentation', 'onedl-mmsegmentation'),
    'mmpretrain': ('mmpretrain', 'onedl-mmpretrain'),
}
PROBED = ('torchvision', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain')
ROOT = Path(__file__).resolve().parents[2]
_SECONDS = 180
_NEW_ENVIRONMENT = 'make a fresh environment: make setup, or make setup STACK=onedl'


def installed() -> dict[str, str]:
    """Return the version of each relevant installed distribution, by its name."""
    found = {}
    for name in ('torchvision', 'mmcv-lite', *(name for names in DISTRIBUTIONS.values() for name in names)):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def stack_lines(found: Mapping[str, str]) -> list[Line]:
    """Report the stack of the distributions, and mixtures of stacks."""
    own = [names[0] for names in DISTRIBUTIONS.values() if names[0] in found]
    forks = [names[1] for names in DISTRIBUTIONS.values() if names[1] in found]
    twice = [module for module, names in DISTRIBUTIONS.items() if all(name in found for name in names)]
    if own and forks:
        text = f"both: {', '.join(own)} of OpenMMLab's and {', '.join(forks)} of the forks"
        if twice:
            text += f'; the files of {", ".join(twice)} are of whichever was installed last'
        return [Line('stack', text, f'keep one stack alone; {_NEW_ENVIRONMENT}')]
    name = "OpenMMLab's own" if own else 'the onedl forks' if forks else 'none installed by pip'
    lines = [Line('stack', name)]
    if 'onedl-mmsegmentation' in found:
        text = "mmengine looks for a distribution mmsegmentation, the fork's has another name"
        lines.append(Line("fork's name", f'{text}; patched by ssm_backbones/compat'))
    return lines


def mmengine_line(found: Mapping[str, str]) -> Line:
    """Report whether mmengine, which everything with configs needs, is installed."""
    hosts = {name for names in DISTRIBUTIONS.values() for name in names}
    if importlib.util.find_spec('mmengine') is None and hosts.isdisjoint(found):
        remedy = "for configs, training and the tools that read configs: pip install 'ssm-backbones[openmmlab]'"
        return Line('mmengine', 'not installed; create_backbone, checkpoints and the scans need none', remedy)
    try:
        version = importlib.import_module('mmengine').__version__
        return Line('mmengine', version)
    except Exception as error:
        remedy = f'pip install "mmengine>=0.10", or {_NEW_ENVIRONMENT}'
        return Line('mmengine', short(error), remedy, broken=True)


def package_line() -> Line:
    """Report whether this package imports, which the report itself does not require."""
    try:
        package = importlib.import_module('ssm_backbones')
    except Exception as error:
        return Line('ssm_backbones', f'does not import: {short(error)}', 'fix what is broken above', broken=True)
    return Line('ssm_backbones', f'imports, from {Path(package.__file__ or "").parent}')


def loading_line(torch: Any) -> Line:
    """Report whether mmengine's loader reads the checkpoints that mmengine writes."""
    name = 'checkpoints'
    try:
        buffer = importlib.import_module('mmengine.logging').HistoryBuffer([1.0], [1])
        file = io.BytesIO()
        torch.save({'loss': buffer}, file)
        file.seek(0)
        # As mmengine's loader finds it: the module in the place of torch there reads weights only.
        importlib.import_module('mmengine.runner.checkpoint').torch.load(file)
    except Exception as error:
        text = f'mmengine does not read its own: {short(error, 120)}'
        return Line(name, text, 'import ssm_backbones first (custom_imports), which allows them', broken=True)
    return Line(name, 'mmengine reads its own, and runs no code from them; patched by ssm_backbones/compat')


def host_lines(found: Mapping[str, str], names: Sequence[str] = PROBED) -> list[Line]:
    """Report each library's version and whether it works, tested in a new process."""
    there = [name for name in names if importlib.util.find_spec(name) is not None]
    answers = probe(there)
    return [_host_line(name, _version(name, found), answers.get(name)) for name in names]


def probe(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Import libraries in new processes; a crash or a timeout is returned as the library's error."""
    answers: dict[str, dict[str, Any]] = {}
    left = list(names)
    while left:
        found, end = _run(left)
        answers.update(found)
        left = [name for name in left if name not in answers]
        if left:
            answers[left[0]] = {'error': end, 'doing': f'import {left[0]}'}
            left = left[1:]
    return answers


def _run(names: Sequence[str]) -> tuple[dict[str, dict[str, Any]], str]:
    command = [sys.executable, '-c', 'from ssm_backbones.doctor.probe import main; main()', *names]
    path = os.pathsep.join(filter(None, [os.environ.get('PYTHONPATH'), str(ROOT)]))
    try:
        process = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors='replace',
            timeout=_SECONDS,
            env={**os.environ, 'PYTHONPATH': path},
        )
        output, said, status = process.stdout, process.stderr, process.returncode
        end = f'the process died of {signal.Signals(-status).name}' if status < 0 else f'it ended with status {status}'
        last = said.strip().splitlines()[-1:] if status > 0 else []
        end = ': '.join([end, *last])
    except subprocess.TimeoutExpired as error:
        output = error.stdout.decode(errors='replace') if isinstance(error.stdout, bytes) else error.stdout or ''
        end = f'it did not end within {_SECONDS} s'
    records = [json.loads(line) for line in output.splitlines() if line.endswith('}')]
    return {record.pop('name'): record for record in records}, short(end)


def _version(name: str, found: Mapping[str, str]) -> str | None:
    return next((found[each] for each in (*DISTRIBUTIONS.get(name, (name,)), f'{name}-lite') if each in found), None)


def _host_line(name: str, version: str | None, answer: Mapping[str, Any] | None) -> Line:
    if answer is None:
        if version is None:
            return Line(name, 'not installed')
        return Line(
            name,
            f'{version} is installed, but there is no module {name}',
            f'reinstall it with pip; {_NEW_ENVIRONMENT}',
            broken=True,
        )
    version = answer.get('version') or version or 'of unknown version'
    if 'error' in answer:
        text = f'{version}: `{answer["doing"]}` fails: {answer["error"]}'
        return Line(name, text, _remedy(name, answer['error']), broken=True)
    if name == 'torchvision' and answer['note']:
        text = f'{version}, whose operators do not load ({answer["note"]}); patched by ssm_backbones/compat'
        remedy = "for the operators too, which no config here needs: the torchvision of torch's own release and build"
        return Line(name, f'{text} for its Python parts', remedy)
    if name == 'mmcv' and answer['note']:
        return Line(
            name,
            f'{version}, whose compiled operators do not load ({answer["note"]})',
            'mmdet and mmseg need them: install mmcv, not mmcv-lite, compiled against this torch',
        )
    bounds = answer.get('bounds')
    return Line(name, f'{version}{f", takes mmcv >= {bounds[0]}, < {bounds[1]}" if bounds else ""}')


def _remedy(name: str, error: str) -> str:
    """Return the remedy of a known error."""
    if 'incompatible' in error:
        return f'install the version that it asks for, or the one of {name} that takes yours; {_NEW_ENVIRONMENT}'
    if 'pkg_resources' in error:
        return "pip install 'setuptools<81'"
    for package in ('ftfy', 'regex'):
        if f"'{package}'" in error:
            return f'pip install {package}'
    if 'mmcv._ext' in error or 'undefined symbol' in error:
        return 'install mmcv, not mmcv-lite, compiled against this torch'
    if 'numpy.dtype size changed' in error or 'compiled using NumPy 1' in error:
        return "pip install --upgrade pycocotools, or pip install 'numpy<2'"
    return f'reinstall it with pip; {_NEW_ENVIRONMENT}'
