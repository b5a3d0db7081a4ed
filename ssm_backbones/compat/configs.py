"""Let configs inherit from those of this package, and from the forks' packages."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from ssm_backbones.utils.configs import PACKAGE, config_file
from ssm_backbones.utils.mm import INSTALLED

if TYPE_CHECKING or INSTALLED:
    from mmengine.config import Config
    from mmengine.config.utils import MODULE2PACKAGE

logger = logging.getLogger(__package__)


@functools.cache
def find_mmseg_configs() -> None:
    """Resolve ``mmseg::`` base configs if mmseg is installed from the fork ``onedl-mmsegmentation``.

    mmengine looks for the distribution ``mmsegmentation``, which that fork does not provide. The patch makes it look
    for the module ``mmseg``, as it does for the other libraries.
    """
    if importlib.util.find_spec('mmseg') is None:
        return
    try:
        importlib.metadata.distribution('mmsegmentation')
    except importlib.metadata.PackageNotFoundError:
        MODULE2PACKAGE['mmseg'] = 'mmseg'
        logger.debug('mmsegmentation is installed under another name; its configs are found by the module mmseg.')


@functools.cache
def allow_inheritance() -> None:
    """Let mmengine resolve base configs named ``'ssm_backbones::...'``, as it does for OpenMMLab's own packages.

    mmengine builds the parts of a config from another package in the registries of that package's scope. These configs
    name parts of the host library that they inherit from, so no scope is returned for them.
    """
    MODULE2PACKAGE.setdefault(PACKAGE, PACKAGE)
    find = Config._get_cfg_path

    @functools.cache
    def find_elsewhere(cfg_path: str) -> tuple[str, str | None]:
        # mmengine would first read all of a library's metafiles, which takes tenths of a second and lists no base.
        return _find_base(cfg_path) or find(cfg_path, '')

    def find_here_too(cfg_path: str, filename: str) -> tuple[str, str | None]:
        package, separator, name = cfg_path.partition('::')
        if separator and package == PACKAGE:
            return config_file(name), None
        return find_elsewhere(cfg_path) if separator else find(cfg_path, filename)

    Config._get_cfg_path = staticmethod(find_here_too)


def _find_base(cfg_path: str) -> tuple[str, str] | None:
    """Return the file and scope of e.g. ``'mmdet::_base_/default_runtime.py'``, or None to let mmengine search."""
    package, _, name = cfg_path.partition('::')
    if package not in MODULE2PACKAGE or not name.startswith('_base_/'):
        return None
    spec = importlib.util.find_spec(package)
    files = [Path(folder, '.mim', 'configs', name) for folder in spec.submodule_search_locations or ()] if spec else []
    return next(((str(file), package) for file in files if file.is_file()), None)
