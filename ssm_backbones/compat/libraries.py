"""Let libraries be imported beside versions of others that they do not expect."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.machinery
import importlib.util
import logging
import os
import sys
from collections.abc import Iterator
from types import ModuleType

import torch

from .imports import ImportObserver, after_import, installed_version

logger = logging.getLogger(__package__)

# Importing torchvision (0.15 to 0.28) looks these operators up; torchvision's own compiled library declares them.
_TORCHVISION_SCHEMAS = (
    'nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor',
    'qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor',
)


@functools.cache
def leave_out_multimodal_models() -> None:
    """Let mmpretrain be imported where transformers 5 is installed, which peft and others bring.

    mmpretrain 1.2, and its fork onedl-mmpretrain 1.3, import their multimodal models wherever they find pycocotools and
    transformers from 4.28 on. These derive from names that transformers 5 no longer has, so ``import
    mmpretrain.models`` ends in ``TypeError: NoneType takes no arguments``. The patch makes it take its multimodal extra
    for missing, as without transformers.
    """
    transformers = installed_version('transformers')
    mmpretrain = installed_version('mmpretrain') or installed_version('onedl-mmpretrain')
    if transformers is None or mmpretrain is None or int(transformers.partition('.')[0]) < 5:
        return

    def leave_out_multimodal(module: ModuleType) -> None:
        if getattr(module, 'WITH_MULTIMODAL', False):
            module.WITH_MULTIMODAL = False  # type: ignore[attr-defined]
            logger.warning(
                "mmpretrain %s's multimodal models (BLIP, CLIP, LLaVA and others) do not import with transformers %s "
                "and are left out; to use them, install 'transformers<5'.",
                mmpretrain,
                transformers,
            )

    after_import('mmpretrain.utils.dependency', leave_out_multimodal)


@functools.cache
def accept_mmcv_2_2() -> None:
    """Let mmdet 3.3 and mmseg 1.2 be imported beside mmcv 2.2.

    They require a version below 2.2.0 of mmcv, which was released after them, and what they use of it is as in 2.1.
    While their ``__init__`` runs, which does nothing but compare versions, mmcv says that it is 2.1.0.
    """
    version = installed_version('mmcv')
    if version is None or not version.startswith('2.2.'):
        return

    @contextlib.contextmanager
    def as_mmcv_2_1(library: str) -> Iterator[None]:
        mmcv = importlib.import_module('mmcv')
        mmcv.__version__ = '2.1.0'  # type: ignore[attr-defined]
        try:
            yield
        finally:
            mmcv.__version__ = version  # type: ignore[attr-defined]
        logger.warning(
            '%s asks for mmcv below 2.2.0 and runs with mmcv %s, since ssm_backbones lets it.', library, version
        )

    for library in ('mmdet', 'mmseg'):
        if library not in sys.modules:
            sys.meta_path.insert(0, ImportObserver(library, functools.partial(as_mmcv_2_1, library)))


@functools.cache
def let_torchvision_be_imported() -> None:
    """Let ``import torchvision`` succeed if its compiled library does not match the installed torch.

    The usual case is torchvision's CUDA wheel beside a CPU-only torch: the import then ends in
    ``operator torchvision::nms does not exist``. mmpretrain imports torchvision for its Python image transforms alone,
    which work without that library; torchvision's own operators still raise their own, clear error, and
    ``python -m ssm_backbones`` tells of the mismatch.
    """
    library = find_torchvision_library()
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
    logger.debug("torchvision's compiled operators do not load with torch %s (%s).", torch.__version__, reason)


def find_torchvision_library() -> str | None:
    spec = importlib.util.find_spec('torchvision')
    if spec is None or not spec.submodule_search_locations:
        return None
    for folder in spec.submodule_search_locations:
        for suffix in importlib.machinery.EXTENSION_SUFFIXES:
            path = os.path.join(folder, '_C' + suffix)
            if os.path.isfile(path):
                return path
    return None
