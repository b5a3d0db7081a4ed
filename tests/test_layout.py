"""The order of the rooms: what each package may import."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = 'ssm_backbones'
# From the ground floor up: a room imports from those before it alone, so that there is no circle.
ROOMS = [
    'utils',
    'compat',
    'layers',
    'backbones',
    'pruning',
    'checkpoints',
    'factory',
    'heads',
    'timm',
    'apis',
    'data_check',
    'flops',
    'engine',
    'shapes',
    'visualization',
    'features',
    'prediction',
    'datasets',
    'project',
    'onnx_export',
    'export',
    'benchmark',
    'demo',
    'doctor',
    'cli',
]
# These are imported when a tool runs, not when the package is.
HOST_LIBRARIES = {'mmdet', 'mmseg', 'mmpretrain', 'mmcv'}


def imports(path: Path, at_import: bool = False) -> Iterator[str]:
    """Dotted names that a file imports, anywhere in it or only while it is imported itself."""
    tree = ast.parse(path.read_text(encoding='utf-8'))
    package = path.relative_to(ROOT).parent.parts
    for node in tree.body if at_import else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = '.'.join(package[: len(package) - node.level + 1]) if node.level else ''
            module = '.'.join(filter(None, [parents, node.module]))
            yield from (f'{module}.{alias.name}' for alias in node.names)


def room(name: str) -> str | None:
    """The room of a dotted name, None for what is not in one."""
    parts = name.split('.')
    return parts[1] if parts[0] == PACKAGE and len(parts) > 1 and parts[1] in ROOMS else None


def files(package: str) -> list[Path]:
    return sorted(path for path in (ROOT / package).rglob('*.py') if '.mim' not in path.parts)


def test_every_file_is_in_a_room():
    top = {path.relative_to(ROOT / PACKAGE).parts[0].removesuffix('.py') for path in files(PACKAGE)}
    assert top - {'__init__', '__main__'} == set(ROOMS)


@pytest.mark.parametrize('name', ROOMS)
def test_no_import_goes_upwards(name: str):
    upwards = []
    for path in files(PACKAGE):
        own = path.relative_to(ROOT / PACKAGE).parts[0].removesuffix('.py')
        if own != name:
            continue
        for imported in imports(path):
            other = room(imported)
            if other is not None and ROOMS.index(other) > ROOMS.index(name):
                upwards.append(f'{path.relative_to(ROOT)} imports {imported}')
            if imported.startswith(f'{PACKAGE}.') and other is None and imported.count('.') == 1:
                # `from ssm_backbones import create_backbone` goes through the top of the house.
                upwards.append(f'{path.relative_to(ROOT)} imports {imported}')
    assert not upwards, '\n'.join(upwards)


def test_the_ops_import_torch_alone():
    allowed = {'torch', 'cuda_ops', 'numpy'}
    foreign = [
        f'{path.name}: {name}'
        for path in files('cuda_ops')
        for name in imports(path)
        if name.partition('.')[0] in {PACKAGE, 'mmengine', 'mmcv', *HOST_LIBRARIES} - allowed
    ]
    assert not foreign


def test_the_state_of_the_ops_is_asked_for_in_public():
    """By ``cuda_ops.backend_status()``."""
    found = [
        f'{path.relative_to(ROOT)}: {name}'
        for path in files(PACKAGE)
        for name in imports(path)
        if name.startswith(('cuda_ops._library', 'cuda_ops._status', 'cuda_ops.__main__'))
    ]
    assert not found


def test_host_libraries_are_imported_by_the_tools_that_need_them():
    found = [
        f'{path.relative_to(ROOT)}: {name}'
        for path in files(PACKAGE)
        for name in imports(path, at_import=True)
        if name.partition('.')[0] in HOST_LIBRARIES
    ]
    # heads.py says that it needs mmpretrain, and is imported by the configs that do.
    assert {line.partition(':')[0] for line in found} <= {f'{PACKAGE}/heads.py'}, found


def test_only_compat_replaces_parts_of_other_libraries():
    """Assignments to attributes of imported names, as in ``Config.method = ...``, are in the package compat alone."""
    found = []
    for path in files(PACKAGE):
        tree = ast.parse(path.read_text(encoding='utf-8'))
        foreign = {
            (alias.asname or alias.name).partition('.')[0]
            for node in ast.walk(tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
            and not (isinstance(node, ast.ImportFrom) and (node.level or (node.module or '').startswith(PACKAGE)))
            for alias in node.names
        }
        for node in ast.walk(tree):
            targets = node.targets if isinstance(node, ast.Assign) else []
            for target in targets:
                base = target
                while isinstance(base, ast.Attribute):
                    base = base.value
                if isinstance(target, ast.Attribute) and isinstance(base, ast.Name) and base.id in foreign:
                    found.append(f'{path.relative_to(ROOT)}:{node.lineno} sets {ast.unparse(target)}')
    assert all(line.startswith(f'{PACKAGE}/compat/') for line in found), '\n'.join(found)
