"""Read a config and import its host library."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.registry import Registry

from ssm_backbones.utils.errors import CommandError

HOST_PACKAGES = {'mmpretrain': 'mmpretrain', 'mmdet': 'mmdet', 'mmseg': 'mmsegmentation'}


def load_config(path: str | Path, cfg_options: Mapping[str, Any] | None = None) -> Config:
    """Read a config file, apply the options and import the host library of its ``default_scope``.

    Raises:
        CommandError: If the file is missing or not a config, if its ``default_scope`` is not mmpretrain, mmdet or
            mmseg, or if that library is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise CommandError(
            f'config file {path} does not exist. The configs that come with this package are in configs/.'
        )
    try:
        cfg = Config.fromfile(path)
        if cfg_options:
            cfg.merge_from_dict(dict(cfg_options))
    except Exception as error:
        raise CommandError(f'config file {path} cannot be read: {type(error).__name__}: {error}') from error
    scope = cfg.get('default_scope')
    if scope not in HOST_PACKAGES:
        raise CommandError(
            f'config file {path} has default_scope={scope!r}; expected one of {", ".join(map(repr, HOST_PACKAGES))}. '
            "Inherit the library's default_runtime.py or set default_scope."
        )
    try:
        importlib.import_module(scope)
    except ImportError as error:
        raise CommandError(
            f'config file {path} needs {HOST_PACKAGES[scope]}, which cannot be imported ({error}). '
            f'Install it: pip install {HOST_PACKAGES[scope]}'
        ) from error
    if scope == 'mmpretrain':
        # A config's own custom_imports replace those of its base, which name the heads.
        importlib.import_module('ssm_backbones.heads')
    if 'model' not in cfg:
        raise CommandError(f'config file {path} has no `model`.')
    return cfg


def registered(registry: Registry, name: str, scope: str) -> Any:
    """Return what a host library's registry has under a name, None if nothing.

    ``registry.get`` alone looks into mmengine's own registry, whatever the default scope.
    """
    with registry.switch_scope_and_registry(scope) as own:
        return own.get(name)
