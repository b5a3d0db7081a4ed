"""Checks before training or testing: missing data, checkpoints and devices are reported before anything is written."""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import DATASETS

from ssm_backbones.apis.config import registered
from ssm_backbones.utils.errors import CommandError


def check_paths(cfg: Config, modes: Sequence[str]) -> None:
    """Check that the files and folders of the datasets and evaluators of ``modes`` exist.

    Checked are annotation files, image folders and data roots on the local disk. Not checked are files in other
    storage backends and datasets that download themselves.

    Args:
        cfg: The config.
        modes: Some of ``'train'``, ``'val'`` and ``'test'``.

    Raises:
        CommandError: If a path is missing. The message names it and its config key.
    """
    for mode in modes:
        loader = cfg.get(f'{mode}_dataloader')
        if loader is not None:
            for key, dataset in leaf_datasets(loader.dataset, f'{mode}_dataloader.dataset'):
                _check_dataset(dataset, key, cfg.default_scope)
        evaluators = cfg.get(f'{mode}_evaluator') or []
        for evaluator in evaluators if isinstance(evaluators, (list, tuple)) else [evaluators]:
            _check_path(evaluator, 'ann_file', None, f'{mode}_evaluator')


def check_checkpoint(path: str | None, key: str) -> None:
    """Check that a checkpoint on the local disk exists; URLs and ``scheme://`` names are left to mmengine.

    Raises:
        CommandError: If the file is missing or a folder. The message names it and the option or config key.
    """
    if path is not None and '://' not in path and not os.path.isfile(os.path.expanduser(path)):
        if os.path.isdir(os.path.expanduser(path)):
            raise CommandError(f'{key}: checkpoint {path} is a folder; name a file in it, such as epoch_12.pth.')
        raise CommandError(f'{key}: checkpoint {path} does not exist.')


def check_device(name: str | None) -> torch.device:
    """Return the device named by ``device``: ``'cpu'``, ``'cuda'`` or ``'cuda:1'``; by default a GPU if available.

    No memory is allocated on it, so that processes that use other GPUs occupy none of it.

    Raises:
        CommandError: If the device does not exist.
    """
    try:
        device = torch.device(name or ('cuda' if torch.cuda.is_available() else 'cpu'))
    except RuntimeError as error:
        raise CommandError(f'device {name} is no device: cpu, cuda or cuda:1.') from error
    if device.type not in ('cpu', 'cuda'):
        raise CommandError(f'device {name} is no device that can be used: cpu, cuda or cuda:1.')
    if device.type == 'cuda' and not torch.cuda.is_available():
        raise CommandError(f'device {device}: no GPU is visible to PyTorch here.')
    if device.type == 'cuda' and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise CommandError(f'device {device}: PyTorch sees {count} GPUs here, cuda:0 to cuda:{count - 1}.')
    return device


def check_init_cfg(model: Mapping[str, Any], key: str = 'model') -> None:
    """Check the checkpoint of every ``init_cfg`` in a model's config.

    For a backbone of this package, a local file of type ``Pretrained`` also has to match the backbone: mmengine would
    only log the mismatches and train from the random initialisation.

    Raises:
        CommandError: If a checkpoint is missing or does not match. The message names the config key and the path, and
            the first mismatches or the type or prefix to set.
    """
    for name, value in model.items():
        inner = f'{key}.{name}'
        if name == 'init_cfg' and isinstance(value, Mapping):
            checkpoint = value.get('checkpoint')
            check_checkpoint(checkpoint, f'{inner}.checkpoint')
            if checkpoint is not None and '://' not in checkpoint and value.get('type') == 'Pretrained':
                host_loading = importlib.import_module('ssm_backbones.checkpoints.host_loading')
                if host_loading.names_backbone(model.get('type')):
                    host_loading.check_pretrained(model, key)
        elif isinstance(value, Mapping):
            check_init_cfg(value, inner)
        elif isinstance(value, (list, tuple)):
            for index, item in enumerate(value):
                if isinstance(item, Mapping):
                    check_init_cfg(item, f'{inner}[{index}]')


def leaf_datasets(dataset: Any, key: str = '') -> Iterator[tuple[str, Any]]:
    """Yield the config key and the config of each dataset inside wrappers such as RepeatDataset and ConcatDataset."""
    if isinstance(dataset.get('dataset'), Mapping):
        yield from leaf_datasets(dataset['dataset'], f'{key}.dataset')
    elif isinstance(dataset.get('datasets'), (list, tuple)):
        for index, inner in enumerate(dataset['datasets']):
            yield from leaf_datasets(inner, f'{key}.datasets[{index}]')
    else:
        yield key, dataset


def is_here(dataset: Mapping[str, Any], scope: str) -> bool:
    """Return whether a data set's files have to be on the local disk: it is not remote and does not download itself."""
    remote = _is_remote(dataset) or not _is_local(dataset.get('data_root') or '')
    return not remote and not _downloads_itself(dataset, scope)


def _check_dataset(dataset: Mapping[str, Any], key: str, scope: str) -> None:
    if _is_remote(dataset) or _downloads_itself(dataset, scope):
        return
    root = dataset.get('data_root') or ''
    if root and _is_local(root) and not os.path.isdir(root):
        raise CommandError(_missing(f'{key}.data_root', root))
    # mmpretrain's datasets with a `split` scan the folder if their list file is missing.
    if not dataset.get('split'):
        _check_path(dataset, 'ann_file', root, key)
    prefix = dataset.get('data_prefix') or {}
    if isinstance(prefix, str):
        _check_path(dataset, 'data_prefix', root, key)
    else:
        for name in prefix:
            _check_path(prefix, name, root, f'{key}.data_prefix')


def _check_path(owner: Mapping[str, Any], name: str, root: str | None, key: str) -> None:
    value = owner.get(name)
    if not isinstance(value, str) or not value or _is_remote(owner):
        return
    path = os.path.join(root, value) if root else value
    if _is_local(path) and not os.path.exists(path):
        raise CommandError(_missing(f'{key}.{name}', path))


def _missing(key: str, path: str) -> str:
    if 'shapes' in Path(path).parts:
        remedy = 'Generate the data: python tools/make_shapes.py'
    else:
        remedy = 'Put or link the data set there (ln -s), or name its place in a config of your own or by cfg_options.'
    return f'{key}: {path} does not exist. {remedy}'


def _is_local(path: str) -> bool:
    return '://' not in path and not path.startswith('s3:')


def _is_remote(owner: Mapping[str, Any]) -> bool:
    return (owner.get('backend_args') or {}).get('backend', 'local') != 'local'


def _downloads_itself(dataset: Mapping[str, Any], scope: str) -> bool:
    kind = registered(DATASETS, dataset['type'], scope) if isinstance(dataset['type'], str) else dataset['type']
    return kind is not None and 'download' in inspect.signature(kind.__init__).parameters
