"""mmengine where it is installed; else stand-ins for the little of it that the backbones themselves use.

The backbones, the loading of checkpoints and timm's interface take it from here and so work with torch alone. All that
reads configs or trains imports mmengine itself, and cannot do without.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

INSTALLED = importlib.util.find_spec('mmengine') is not None
STACKS = "install one stack of host libraries, `pip install 'ssm-backbones[openmmlab]'` or `'ssm-backbones[onedl]'`"
REMEDY = f'{STACKS}, or mmengine alone'

if TYPE_CHECKING or INSTALLED:
    from mmengine.config import DictAction
    from mmengine.logging import HistoryBuffer, print_log
    from mmengine.model import BaseModule, is_model_wrapper
    from mmengine.registry import MODELS, TRANSFORMS, WEIGHT_INITIALIZERS
else:
    Class = TypeVar('Class')

    class BaseModule(nn.Module):
        """A module without the initialisation configs, which need mmengine's registries."""

        def __init__(self, init_cfg: dict | list[dict] | None = None) -> None:
            super().__init__()
            if init_cfg is not None:
                raise ImportError(f'init_cfg needs mmengine, which is not installed; {REMEDY}')
            self.init_cfg = None

        def init_weights(self) -> None:
            """Keep the weights: the constructor has initialised them."""

    class DictAction(argparse.Action):
        """Refuse to replace settings of a config, which cannot be read."""

        def __call__(self, parser: argparse.ArgumentParser, *arguments: Any) -> None:
            parser.error(f'{self.option_strings[0]} needs mmengine, which is not installed; {REMEDY}')

    class HistoryBuffer:
        """What mmengine's runner saves of each loss beside the weights; only to be read past."""

        __module__ = 'mmengine.logging.history_buffer'

        def min(self) -> None: ...

        def max(self) -> None: ...

        def mean(self) -> None: ...

        def current(self) -> None: ...

    class _Registry:
        def register_module(self, name: str | None = None) -> Callable[[Class], Class]:
            return lambda kind: kind

    MODELS = TRANSFORMS = WEIGHT_INITIALIZERS = _Registry()

    def is_model_wrapper(module: nn.Module) -> bool:
        """Return whether a module wraps a whole model to distribute it."""
        return isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel)

    def print_log(message: str, logger: Any = None, level: int = logging.INFO) -> None:
        """Log through the logger ``ssm_backbones``; print to stderr where no logging is set up."""
        log = logging.getLogger('ssm_backbones')
        if log.hasHandlers():
            log.log(level, message)
        else:
            print(message, file=sys.stderr)


__all__ = [
    'INSTALLED',
    'MODELS',
    'REMEDY',
    'TRANSFORMS',
    'WEIGHT_INITIALIZERS',
    'BaseModule',
    'DictAction',
    'HistoryBuffer',
    'is_model_wrapper',
    'print_log',
]
