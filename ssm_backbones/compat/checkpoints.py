"""Which checkpoints are read, how safely, and under which names."""

from __future__ import annotations

import codecs
import functools
import importlib
import logging
import pickle
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

from ssm_backbones.utils.mm import HistoryBuffer
from ssm_backbones.utils.torch_compat import allow_in_checkpoints, torch_load_weights

from .imports import after_import

logger = logging.getLogger(__package__)

_NUMERIC_DTYPES = '? b B h H i I l L q Q e f d g'.split()


@functools.cache
def allow_runners_in_checkpoints() -> None:
    """Let ``torch.load`` read the checkpoints of mmengine's runner with ``weights_only=True``, torch 2.6's default.

    Besides tensors, they contain the message hub: NumPy arrays, NumPy scalars and ``HistoryBuffer``, which pickles its
    statistics methods by ``getattr``. Exactly these are allowed. ``getattr`` itself would not be safe: its name is
    bound to a function that returns ``HistoryBuffer``'s public methods and rejects everything else.
    """
    multiarray = importlib.import_module('numpy._core.multiarray' if hasattr(np, '_core') else 'numpy.core.multiarray')
    classes = [HistoryBuffer, np.ndarray, np.dtype, *{type(np.dtype(code)) for code in _NUMERIC_DTYPES}]
    allowed: dict[str, Any] = {f'{kind.__module__}.{kind.__qualname__}': kind for kind in classes}
    # NumPy 1 wrote the module as numpy.core, NumPy 2 writes numpy._core; either may read the other's checkpoints.
    for module in ('numpy.core.multiarray', 'numpy._core.multiarray'):
        allowed |= {f'{module}._reconstruct': multiarray._reconstruct, f'{module}.scalar': multiarray.scalar}
    # How NumPy stores bytes in old pickles, which torch allows by itself from 2.5 on.
    allowed |= {'_codecs.encode': codecs.encode, 'builtins.getattr': _history_buffer_method}
    allow_in_checkpoints(allowed)
    logger.debug("mmengine's HistoryBuffer and NumPy numbers may be read from checkpoints (weights_only=True).")


def _history_buffer_method(owner: Any, name: str) -> Callable[..., Any]:
    if owner is HistoryBuffer and isinstance(name, str) and not name.startswith('_') and hasattr(HistoryBuffer, name):
        return getattr(HistoryBuffer, name)
    raise pickle.UnpicklingError(f'a checkpoint may not ask for attribute {name!r} of {owner!r}')


@functools.cache
def let_mmengine_read_weights_only() -> None:
    """Make mmengine's loaders read every checkpoint with ``weights_only=True``.

    Left alone, a checkpoint named by a URL may run code with every version of torch, since ``torch.hub``'s default is
    False; one in a file with torch before 2.6; and with the fork ``onedl-mmengine`` any, since it reads a file that was
    refused once more with ``weights_only=False``.
    """
    after_import('mmengine.runner.checkpoint', read_weights_only)


def read_weights_only(module: Any) -> None:
    """Make a module's ``torch.load``, ``load_url`` and ``_safe_torch_load`` read with ``weights_only=True``."""
    module.torch = _TorchOfWeights()
    module.load_url = functools.partial(module.load_url, weights_only=True)
    if hasattr(module, '_safe_torch_load'):
        module._safe_torch_load = lambda file, map_location=None, weights_only=True: _TorchOfWeights.load(
            file, map_location=map_location
        )


class _TorchOfWeights:
    """Stands for the module ``torch`` in another module, with a ``load`` that runs no code."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def load(f: Any, map_location: Any = None, pickle_module: Any = None, **options: Any) -> Any:
        return torch_load_weights(f, map_location=map_location, **options)


@functools.cache
def revise_loaded_names(revise: Callable[[nn.Module, Mapping[str, Any]], Mapping[str, Any]]) -> None:
    """Pass each state dict through a function before mmengine loads it into a module.

    mmengine's ``load_state_dict`` hands each part of a model only the entries under that part's own name, so that no
    part sees that they carry a prefix more.

    Args:
        revise: Takes the module and the state dict, and returns the state dict to load.
    """

    def patch(checkpoint: ModuleType) -> None:
        load = checkpoint.load_state_dict

        @functools.wraps(load)
        def load_revised(module: nn.Module, state_dict: Mapping[str, Any], *args: Any, **options: Any) -> Any:
            return load(module, revise(module, state_dict), *args, **options)

        checkpoint.load_state_dict = load_revised  # type: ignore[attr-defined]

    after_import('mmengine.runner.checkpoint', patch)


@functools.cache
def keep_names_in_transformers() -> None:
    """Keep transformers 5 from renaming parameters of the backbones when it loads a model that it saved itself.

    For DETR and RT-DETR it renames every ``out_proj`` in a file to ``o_proj``, as its own attention layers are called
    now, the backbone's too. Those weights of a mixer would then start from random numbers, of which only a report of
    missing names tells (findings/transformers-detr-out-proj.sh). The patch leaves ``mixer.out_proj`` out of it.
    """

    def patch(module: ModuleType) -> None:
        build = getattr(module, '_build_checkpoint_conversion_mapping', None)
        if build is None:
            return
        renaming = module.WeightRenaming

        def narrowed(mappings: dict[str, Any] | None) -> dict[str, Any] | None:
            for transforms in (mappings or {}).values():
                for place, transform in enumerate(transforms):
                    if type(transform) is renaming and transform.source_patterns == ['out_proj']:
                        transforms[place] = renaming(r'(?<!mixer\.)out_proj', 'o_proj')
            return mappings

        module._build_checkpoint_conversion_mapping = lambda: narrowed(build())  # type: ignore[attr-defined]
        narrowed(getattr(module, '_checkpoint_conversion_mapping_cache', None))

    after_import('transformers.conversion_mapping', patch)
