"""Mends for clashes between the libraries this package stands on.

``import ssm_backbones`` applies them, since a config's ``custom_imports`` is the earliest moment at which a plugin runs
inside mmdet's, mmseg's or mmpretrain's own tools; the command lines in ``tools/`` therefore import this package before
any host library. Nothing here imports a host library or torchvision. Each mend looks first whether it is needed, is
applied at most once in a process and is reported through the logger ``ssm_backbones.compat``.
"""

from __future__ import annotations

import codecs
import functools
import importlib.machinery
import importlib.metadata
import importlib.util
import logging
import os
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.logging import HistoryBuffer

from ssm_backbones.torch_compat import allow_in_checkpoints

logger = logging.getLogger(__name__)

# Importing torchvision (0.15 to 0.28) looks these operators up; torchvision's own compiled library declares them.
_TORCHVISION_SCHEMAS = (
    'nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor',
    'qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor',
)

_NUMERIC_DTYPES = '? b B h H i I l L q Q e f d g'.split()


def apply_mends() -> None:
    """Apply every mend that the installed versions need. Cheap, and harmless when called again."""
    _mend_torchvision_import()
    _mend_checkpoint_loading()
    _mend_mmseg_bases()


@functools.cache
def _mend_mmseg_bases() -> None:
    """Let configs inherit ``mmseg::`` ones where mmseg comes from the fork ``onedl-mmsegmentation``.

    mmengine looks for the distribution ``mmsegmentation``, whose name differs from its module's; the other libraries of
    the fork are found by their modules' names, and so is mmseg then.
    """
    if importlib.util.find_spec('mmseg') is None:
        return
    try:
        importlib.metadata.distribution('mmsegmentation')
    except importlib.metadata.PackageNotFoundError:
        MODULE2PACKAGE['mmseg'] = 'mmseg'
        logger.debug('mmsegmentation is installed under another name; its configs are found by the module mmseg.')


@functools.cache
def _mend_torchvision_import() -> None:
    """Let ``import torchvision`` succeed where its compiled library does not fit the installed torch.

    The usual case is torchvision's CUDA wheel beside a CPU-only torch: the import then ends in
    ``operator torchvision::nms does not exist``. mmpretrain imports torchvision for its Python image transforms alone,
    which work without that library; torchvision's own operators go on raising their own, clear error.
    """
    library = _find_torchvision_library()
    if library is None:
        return
    try:
        torch.ops.load_library(library)
        return
    except OSError as error:
        reason = str(error.__cause__ or error)
    for schema in _TORCHVISION_SCHEMAS:
        name = schema.partition('(')[0]
        if not hasattr(torch.ops.torchvision, name):
            torch.library.define(f'torchvision::{name}', schema[len(name) :])
    logger.warning(
        "torchvision's compiled operators do not load beside torch %s (%s). Its Python parts serve without them; "
        'install the torchvision that matches torch to have the operators too.',
        torch.__version__,
        reason,
    )


def _find_torchvision_library() -> str | None:
    spec = importlib.util.find_spec('torchvision')
    if spec is None or not spec.submodule_search_locations:
        return None
    for folder in spec.submodule_search_locations:
        for suffix in importlib.machinery.EXTENSION_SUFFIXES:
            path = os.path.join(folder, '_C' + suffix)
            if os.path.isfile(path):
                return path
    return None


@functools.cache
def _mend_checkpoint_loading() -> None:
    """Let ``torch.load`` read the checkpoints of mmengine's runner with ``weights_only=True``, torch 2.6's default.

    Beside tensors they hold the message hub: ``HistoryBuffer``, which pickles its statistics methods by ``getattr``,
    NumPy arrays and NumPy scalars. Exactly these are declared safe. ``getattr`` itself would not be: the name is bound
    to a function that hands out ``HistoryBuffer``'s public methods and refuses everything else.
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
