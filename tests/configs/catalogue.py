"""The configs and metafiles, read and built once for all tests."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from ssm_backbones.apis.config import load_config

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / 'configs'
METAFILES = {path.parent.name: path for path in sorted(FOLDER.glob('*/metafile.yml'))}
NAMES = sorted(f'{path.parent.name}/{path.stem}' for path in FOLDER.glob('*/*.py') if path.parent.name != '_base_')
DEMOS = [name for name in NAMES if name.endswith('_demo_shapes')]
ZOO = [name for name in NAMES if name not in DEMOS]
HOSTS = ('mmpretrain', 'mmdet', 'mmseg')


@functools.cache
def _config(name: str) -> Config:
    return load_config(FOLDER / f'{name}.py')


def config(name: str) -> Config:
    """A copy of a config by folder and name, e.g. ``'vmamba/vmamba-tiny_8xb128_in1k'``."""
    return Config(_config(name).to_dict())


@functools.cache
def model(name: str) -> nn.Module:
    """A config's model without memory for its weights; not to be changed."""
    cfg = config(name)
    with DefaultScope.overwrite_default_scope(cfg.default_scope), torch.device('meta'):
        return MODELS.build(cfg.model)


@functools.cache
def entries() -> dict[str, dict[str, Any]]:
    """The metafiles' models by folder and name."""
    found: dict[str, dict[str, Any]] = {}
    for family, path in METAFILES.items():
        for entry in yaml.safe_load(path.read_text(encoding='utf-8'))['Models']:
            name = f'{family}/{entry["Name"]}'
            assert name not in found, f'{name} stands twice in {path}'
            found[name] = entry
    return found


def types(value: Any, key: str = 'model') -> Iterator[tuple[str, str]]:
    """Every component of a model's config with its place."""
    if isinstance(value, Mapping):
        if 'type' in value:
            yield key, value['type']
        for name, inner in value.items():
            yield from types(inner, f'{key}.{name}')


def pipeline(steps: Any) -> list[Any]:
    """A pipeline as comparable plain values, without mmengine's marks of where a part was inherited from."""
    return [_plain(step) for step in steps]


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items() if key != '_scope_'}
    return [_plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value
