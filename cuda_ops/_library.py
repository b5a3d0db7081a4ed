"""Find the compiled library, or say why there is none, and register what serves each device."""

import json
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula

_PACKAGE = Path(__file__).parent
LIBRARY_PATH = _PACKAGE / '_C.so'
INFO_PATH = _PACKAGE / '_build_info.json'
STRICT_VARIABLE = 'SSM_OPS_STRICT'
_REMEDY = 'Build it with `pip install -e . --no-build-isolation` in the checkout'


@dataclass(frozen=True)
class Status:
    """What was found: the compiled library's build record, or the reason why it is not in use."""

    compiled: bool
    reason: str
    info: Mapping[str, object]

    @property
    def devices(self) -> tuple[str, ...]:
        """Device types served by compiled kernels."""
        if not self.compiled:
            return ()
        return ('cpu', 'cuda') if self.info.get('cuda') else ('cpu',)


def _load() -> Status:
    if not LIBRARY_PATH.exists():
        return Status(False, f'the compiled library {LIBRARY_PATH.name} does not exist', {})
    try:
        info = json.loads(INFO_PATH.read_text())
        if not isinstance(info, dict):
            raise ValueError(f'it holds {info!r:.40} instead of an object')
    except (OSError, ValueError) as error:
        return Status(False, f'the record of its build, {INFO_PATH.name}, cannot be read ({error})', {})
    built_for = str(info.get('torch'))
    if built_for != torch.__version__:
        return Status(False, f'it was compiled for torch {built_for}, and this is torch {torch.__version__}', info)
    try:
        torch.ops.load_library(str(LIBRARY_PATH))
    except OSError as error:
        return Status(False, f'it cannot be loaded ({error})', info)
    return Status(True, f'compiled for torch {built_for}', info)


STATUS = _load()


def _kernel_constants() -> tuple[Mapping[str, int], frozenset[int]]:
    if not STATUS.compiled:
        return {}, frozenset()
    try:
        return torch.ops.cuda_ops.kernel_constants(), frozenset(torch.ops.cuda_ops.specialized_states())
    except AttributeError as error:
        raise ImportError(
            f'{LIBRARY_PATH} was compiled from other sources than these: it does not have their constants. {_REMEDY}.'
        ) from error


# What the CUDA kernels save depends on these (csrc/library_bindings.cpp); empty where there is no compiled library. The
# reference needs none of them.
KERNEL_CONSTANTS, SPECIALIZED_STATES = _kernel_constants()


def define(library: torch.library.Library, schema: str) -> None:
    """Define an operator, whose kernels the compiled library may have registered already.

    Raises:
        ImportError: If its kernels take other arguments.
    """
    try:
        library.define(schema)
    except RuntimeError as error:
        if not STATUS.compiled:
            raise
        raise ImportError(
            f'{LIBRARY_PATH} was compiled from other sources than these: its cuda_ops::'
            f'{schema.partition("(")[0]} takes other arguments. {_REMEDY}.'
        ) from error


def serve(library: torch.library.Library, references: Mapping[str, Callable]) -> None:
    """Let the PyTorch reference serve every device for which no kernel is compiled.

    Args:
        library: the operators' library.
        references: implementation in PyTorch by operator name.
    """
    for name, reference in references.items():
        for device, key in (('cpu', 'CPU'), ('cuda', 'CUDA')):
            if device not in STATUS.devices:
                library.impl(name, _announced(reference, device), key)


def count_flops(name: str, formula: Callable[..., int]) -> None:
    """Register the FLOPs of ``cuda_ops::name`` with ``torch.utils.flop_counter``, which counts a multiply-add twice.

    Args:
        name: the operator's.
        formula: the count from the shapes of the operator's arguments, a multiply-add counted once.
    """

    def counted_twice(*shapes: Any, **kwargs: Any) -> int:
        return 2 * formula(*shapes, **kwargs)

    operator = getattr(torch.ops.cuda_ops, name)
    # torch 2.4 registers the overloads alone, and then looks for the operator.
    flop_registry[operator] = register_flop_formula(operator)(counted_twice)


_announced_devices: set[str] = set()


def _announced(reference: Callable, device: str) -> Callable:
    """Warn at the reference's first use on a device, or refuse it where only compiled kernels are wanted."""

    def call(*args):
        if os.environ.get(STRICT_VARIABLE, '0') not in ('', '0'):
            raise RuntimeError(
                f'{STRICT_VARIABLE} is set and cuda_ops has no compiled kernel for {device}: '
                f'{why_reference(device)}. {_REMEDY}.'
            )
        if device not in _announced_devices:
            _announced_devices.add(device)
            warnings.warn(
                f'cuda_ops uses its PyTorch reference on {device}, which is slow and stores every state: '
                f'{why_reference(device)}. {_REMEDY}; {STRICT_VARIABLE}=1 turns this warning into an error.',
                stacklevel=2,
            )
        return reference(*args)

    return call


def why_reference(device: str) -> str:
    """The reason why the reference serves a device."""
    if STATUS.compiled and device == 'cuda':
        return 'the library was compiled without CUDA kernels'
    return STATUS.reason
