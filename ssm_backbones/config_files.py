"""The configs that come with the package, and mmengine's inheritance from them.

``_base_ = 'ssm_backbones::vmamba/mask-rcnn_vmamba-tiny_fpn_1x_coco.py'`` works in any folder, in every process that has
imported ``ssm_backbones`` when it reads the config, as this package's tools have. mmengine reads bases before
``custom_imports``, so a config for a host library's own tools imports the package on the way:
``_base_ = __import__('ssm_backbones').config_file('vmamba/mask-rcnn_vmamba-tiny_fpn_1x_coco.py')``.
"""

from __future__ import annotations

import difflib
import functools
import importlib.util
from pathlib import Path

from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE

PACKAGE = 'ssm_backbones'
_FOLDER = Path(__file__).resolve().parent


def config_folder() -> Path:
    """The folder of the configs: ``.mim/configs`` in an installed package, else the checkout's ``configs``.

    Raises:
        FileNotFoundError: if neither is there.
    """
    for folder in (_FOLDER / '.mim' / 'configs', _FOLDER.parent / 'configs'):
        if (folder / '_base_').is_dir():
            return folder
    raise FileNotFoundError(f'{_FOLDER} was installed without configs; install the package anew, by pip')


def config_file(name: str) -> str:
    """The path of one of the package's configs.

    Args:
        name: path below the folder of configs, e.g. ``'vmamba/vmamba-tiny_8xb128_in1k.py'``.

    Raises:
        FileNotFoundError: if there is none of that name.
    """
    folder = config_folder()
    path = folder / name
    if not path.is_file():
        known = [str(file.relative_to(folder)) for file in folder.rglob('*.py')]
        close = difflib.get_close_matches(name, known, n=1)
        hint = f'; did you mean {close[0]!r}?' if close else ''
        raise FileNotFoundError(f'{PACKAGE} has no config {name!r}{hint} The configs are in {folder}')
    return str(path)


@functools.cache
def allow_inheritance() -> None:
    """Let mmengine find ``'ssm_backbones::...'`` among configs, which it does for OpenMMLab's own packages only.

    What mmengine reads from another package it builds in the registries of that package's name. These configs name the
    parts of whichever host library they inherit from, so they are read as if they lay beside the config.
    """
    MODULE2PACKAGE.setdefault(PACKAGE, PACKAGE)
    find = Config._get_cfg_path

    @functools.cache
    def find_elsewhere(cfg_path: str) -> tuple[str, str | None]:
        # mmengine first reads all of a library's metafiles, in tenths of a second, where no metafile lists a base.
        return _find_base(cfg_path) or find(cfg_path, '')

    def find_here_too(cfg_path: str, filename: str) -> tuple[str, str | None]:
        package, separator, name = cfg_path.partition('::')
        if separator and package == PACKAGE:
            return config_file(name), None
        return find_elsewhere(cfg_path) if separator else find(cfg_path, filename)

    Config._get_cfg_path = staticmethod(find_here_too)


def _find_base(cfg_path: str) -> tuple[str, str] | None:
    """The file and scope for such as ``'mmdet::_base_/default_runtime.py'``; None where mmengine has to look."""
    package, _, name = cfg_path.partition('::')
    if package not in MODULE2PACKAGE or not name.startswith('_base_/'):
        return None
    spec = importlib.util.find_spec(package)
    files = [Path(folder, '.mim', 'configs', name) for folder in spec.submodule_search_locations or ()] if spec else []
    return next(((str(file), package) for file in files if file.is_file()), None)
