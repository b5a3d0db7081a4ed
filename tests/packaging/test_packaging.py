"""The pins and the extras: complete, exact, installed, and bound to no package index."""

import os
import re
import sys
from importlib import metadata

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import cuda_ops
import ssm_backbones

STACKS = ('openmmlab', 'onedl')
FILES = ('base', 'build', 'convert', 'dev', 'onnx', *STACKS)


def requirements(root, name):
    lines = (root / 'requirements' / f'{name}.txt').read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith('#')]


def pins(root, python):
    """Pinned versions by package for a Python version."""
    found = {}
    for requirement in requirements(root, 'constraints'):
        if requirement.marker is None or requirement.marker.evaluate({'python_version': python}):
            name = canonicalize_name(requirement.name)
            assert name not in found, f'{name} is pinned twice for Python {python}'
            (specifier,) = requirement.specifier
            assert specifier.operator == '==', str(requirement)
            found[name] = specifier.version
    return found


def installed(name):
    """Version of an installed package without its local part, or None."""
    try:
        return metadata.version(name).partition('+')[0]
    except metadata.PackageNotFoundError:
        return None


@pytest.mark.parametrize('python', ['3.10', '3.11', '3.12', '3.13', '3.14'])
@pytest.mark.parametrize('name', FILES)
def test_everything_asked_for_is_pinned(root, python, name):
    pinned = pins(root, python)
    for requirement in requirements(root, name):
        own = [specifier for specifier in requirement.specifier if specifier.operator == '==']
        if not own:
            assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), str(requirement)


@pytest.mark.skipif(
    os.environ.get('CI_PINS') != '1', reason='needs CI_PINS=1, as `make test` sets it: other versions may be installed'
)
def test_installed_versions_are_the_pinned_ones(root):
    expected = pins(root, '{}.{}'.format(*sys.version_info[:2]))
    stack = 'onedl' if installed('onedl-mmengine') else 'openmmlab'
    for requirement in requirements(root, stack):
        for specifier in requirement.specifier:
            if specifier.operator == '==':
                expected[requirement.name] = specifier.version
    here = {name: version for name in expected if (version := installed(name))}
    assert {'torch', 'numpy', 'setuptools', 'pip', 'pytest', 'opencv-python'} <= here.keys()
    assert here == {name: expected[name] for name in here}, 'run `make setup`'


def test_stacks_have_no_package_in_common_that_another_replaces(root):
    base = {requirement.name for requirement in requirements(root, 'base')}
    assert not {name for name in base if 'mm' in name}
    first, second = (
        {requirement.name for requirement in requirements(root, stack) if 'mm' in requirement.name} for stack in STACKS
    )
    assert len(first) == len(second) == 5
    assert not first & second


def test_no_package_index_is_named(root):
    files = [
        *(root / 'requirements').glob('*.txt'),
        root / 'Makefile',
        root / 'pyproject.toml',
        root / 'setup.py',
        root / 'tools' / 'bootstrap.py',
        root / '.ci' / 'run',
    ]
    index = re.compile(r'https?://|--(extra-)?index-url|--find-links|^-f |@ *(git|file)', re.MULTILINE)
    assert not [path.name for path in files if index.search(path.read_text())]


def test_the_latest_release_in_the_changelog_is_the_version(root):
    changelog = (root / 'CHANGELOG.md').read_text(encoding='utf-8')
    versions = re.findall(r'^## (\S+) \((\d{4}-\d\d-\d\d)\)$', changelog, re.MULTILINE)
    assert versions[0][0] == ssm_backbones.__version__ == cuda_ops.__version__
    assert [date for _, date in versions] == sorted((date for _, date in versions), reverse=True)
