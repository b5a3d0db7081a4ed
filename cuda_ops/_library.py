"""Find the compiled library, or say why there is none, and register what serves each device."""

import ctypes
import functools
import json
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cuda_ops._build import parse_release
from cuda_ops._torch_compat import OutOfMemoryError, is_compiling, register_flop_formula

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
    oldest = info.get('oldest_torch')
    built_for = f'torch {oldest} and newer' if oldest else f'torch {info.get("torch")}'
    fits = _serves(str(oldest)) if oldest else info.get('torch') == torch.__version__
    if not fits:
        return Status(False, f'it was compiled for {built_for}, and this is torch {torch.__version__}', info)
    try:
        torch.ops.load_library(str(LIBRARY_PATH))
    except OSError as error:
        return Status(False, f'it cannot be loaded ({error})', info)
    return Status(True, f'compiled for {built_for}', info)


def _serves(oldest: str) -> bool:
    """Whether a library with torch's stable ABI, compiled for a version such as 2.10 and newer, serves this torch."""
    try:
        return parse_release(torch.__version__) >= parse_release(oldest)
    except ValueError:
        return False


STATUS = _load()


def _interface() -> Mapping[str, Any]:
    """Read the library's constants and its operators' argument types (csrc/library_bindings.cpp)."""
    if not STATUS.compiled:
        return {'constants': {}, 'specialized_states': [], 'operators': {}}
    try:
        describe = ctypes.CDLL(str(LIBRARY_PATH)).cuda_ops_interface
    except AttributeError as error:
        raise ImportError(
            f'{LIBRARY_PATH} was compiled from other sources than these: it does not have their constants. {_REMEDY}.'
        ) from error
    describe.restype = ctypes.c_char_p
    return json.loads(describe())


_INTERFACE = _interface()
# What the CUDA kernels save depends on these; empty where there is no compiled library. The reference needs none.
KERNEL_CONSTANTS: Mapping[str, int] = _INTERFACE['constants']
SPECIALIZED_STATES = frozenset(_INTERFACE['specialized_states'])


@functools.cache
def cpu_capability() -> str:
    """Return the instruction set of the compiled CPU kernels: 'baseline', 'avx2' or 'avx512'.

    Raises:
        RuntimeError: If there is no compiled library.
        ValueError: If SSM_OPS_CPU_CAPABILITY names none.
    """
    if not STATUS.compiled:
        raise RuntimeError(f'there are no compiled kernels: {STATUS.reason}. {_REMEDY}.')
    capability = ctypes.CDLL(str(LIBRARY_PATH)).cuda_ops_cpu_capability
    capability.restype = ctypes.c_char_p
    name = capability()
    if name is None:
        value = os.environ.get('SSM_OPS_CPU_CAPABILITY')
        raise ValueError(f'SSM_OPS_CPU_CAPABILITY is {value!r}; it must be baseline, avx2 or avx512')
    return name.decode()


def define(library: torch.library.Library, schema: str) -> None:
    """Define an operator, whose kernels the compiled library may have registered already.

    Raises:
        ImportError: If its kernels take other arguments.
    """
    name = schema.partition('(')[0]
    # Only for kernels without the stable ABI torch compares them itself, and then their number and types alone as well.
    types = ', '.join(str(argument.type) for argument in torch._C.parse_schema(f'cuda_ops::{schema}').arguments)
    if STATUS.compiled and _INTERFACE['operators'].get(name) != types:
        raise ImportError(
            f'{LIBRARY_PATH} was compiled from other sources than these: its cuda_ops::{name} takes other arguments. '
            f'{_REMEDY}.'
        )
    library.define(schema)


def call(operator: Callable, *arguments: Any) -> Any:
    """Call an operator, and raise PyTorch's OutOfMemoryError where memory runs out: the stable ABI loses its type.

    Raises:
        OutOfMemoryError of PyTorch: If a tensor of the result, or scratch memory, cannot be allocated.
    """
    if is_compiling():
        return operator(*arguments)
    try:
        return operator(*arguments)
    except RuntimeError as error:
        if 'cuda_ops: out of memory' not in str(error):
            raise
        raise OutOfMemoryError(str(error)) from None


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

    register_flop_formula(getattr(torch.ops.cuda_ops, name), counted_twice)


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
