"""Answer imports of mamba-ssm's modules."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

from cuda_ops.mamba_ssm import _convolution, _extensions, _interface

_SCANS = {
    name: getattr(_interface, name)
    for name in ('selective_scan_fn', 'selective_scan_ref', 'mamba_inner_fn', 'mamba_inner_ref')
}
_CONVOLUTIONS = {name: getattr(_convolution, name) for name in ('causal_conv1d_fn', 'causal_conv1d_update')}
_SERVED: dict[str, dict[str, Callable[..., Any]]] = {
    'mamba_ssm': {name: _SCANS[name] for name in ('selective_scan_fn', 'mamba_inner_fn')},
    'mamba_ssm.ops': {},
    'mamba_ssm.ops.selective_scan_interface': _SCANS,
    'selective_scan_cuda': dict(fwd=_extensions.mamba_forward, bwd=_extensions.mamba_backward),
    'selective_scan_cuda_core': dict(fwd=_extensions.core_forward, bwd=_extensions.core_backward),
    'selective_scan_cuda_oflex': dict(fwd=_extensions.oflex_forward, bwd=_extensions.core_backward),
    'causal_conv1d': _CONVOLUTIONS,
    'causal_conv1d.causal_conv1d_interface': _CONVOLUTIONS,
}
_PACKAGES = ('mamba_ssm', 'mamba_ssm.ops', 'causal_conv1d')
_INSTALL = (
    'for its other modules install its Python files beside it, by `MAMBA_SKIP_CUDA_BUILD=TRUE pip install --no-deps '
    '--no-build-isolation mamba-ssm`'
)
_WRITE_OUT = 'call selective_scan_fn and causal_conv1d_fn in its place'
# What programs ask for by name and would otherwise be told nothing about: the remedy, by module and name.
_NOT_SERVED = {
    'mamba_ssm.ops.selective_scan_interface': dict.fromkeys(
        ('SelectiveScanFn', 'MambaInnerFn', 'mamba_inner_fn_no_out_proj', 'bimamba_inner_fn', 'BiMambaInnerFn'),
        _WRITE_OUT,
    ),
    'causal_conv1d': dict.fromkeys(('causal_conv1d_varlen_states',), 'call causal_conv1d_fn with seq_idx'),
}
# Where an installed mamba-ssm defines what it offers at its top, whose file imports Triton and CUDA code.
_TOP = {
    'Mamba': 'mamba_ssm.modules.mamba_simple',
    'Mamba2': 'mamba_ssm.modules.mamba2',
    'Mamba3': 'mamba_ssm.modules.mamba3',
    'MambaLMHeadModel': 'mamba_ssm.models.mixer_seq_simple',
}


class _Finder(MetaPathFinder, Loader):
    """Finds and makes the served modules, and says which those are where another one is missing."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname in _SERVED:
            spec = ModuleSpec(fullname, self, origin=__file__, is_package=fullname in _PACKAGES)
            if spec.submodule_search_locations is not None and fullname.startswith('mamba_ssm'):
                installed = PathFinder.find_spec(fullname, path)
                spec.submodule_search_locations += (installed and installed.submodule_search_locations) or []
            return spec
        root = fullname.partition('.')[0]
        if root not in ('mamba_ssm', 'causal_conv1d', 'causal_conv1d_cuda') or PathFinder.find_spec(fullname, path):
            return None
        remedy = _INSTALL if root == 'mamba_ssm' else _WRITE_OUT
        raise ModuleNotFoundError(
            f'{fullname} is not served by cuda_ops.mamba_ssm, which serves {", ".join(_SERVED)}; {remedy}',
            name=fullname,
        )

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = _Module(spec.name, f'Served by cuda_ops.mamba_ssm: {", ".join(_SERVED[spec.name]) or "its modules"}.')
        module.__file__ = __file__
        return module

    def exec_module(self, module: ModuleType) -> None:
        vars(module).update(_SERVED[module.__name__])


class _Module(ModuleType):
    """A served module, which says so of names that it does not have."""

    def __getattr__(self, name: str) -> Any:
        place = f'{self.__name__}.{name}'
        if self.__name__ == 'mamba_ssm' and name in _TOP:
            if len(self.__path__):
                return getattr(import_module(_TOP[name]), name)
            raise ImportError(f'{place} is not served by cuda_ops.mamba_ssm; {_INSTALL}', name=place)
        remedy = _NOT_SERVED.get(self.__name__, {}).get(name)
        if remedy is not None:
            # An AttributeError's message would not reach `from ... import name`.
            raise ImportError(f'{place} is not served by cuda_ops.mamba_ssm; {remedy}', name=place)
        raise AttributeError(f'{place} is not served by cuda_ops.mamba_ssm')


_FINDER = _Finder()


def install() -> None:
    """Answer imports of mamba-ssm's modules from now on; a second call changes nothing.

    Raises:
        ImportError: If the program has imported one of them from elsewhere already.
    """
    foreign = [name for name in _SERVED if name in sys.modules and not isinstance(sys.modules[name], _Module)]
    if foreign:
        raise ImportError(
            f'{", ".join(foreign)} was imported before cuda_ops.mamba_ssm; import cuda_ops.mamba_ssm first, or run '
            'the program by `python -m cuda_ops.mamba_ssm script.py`'
        )
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)


def uninstall() -> None:
    """Stop answering until the next import; modules that a program has imported keep their functions."""
    if _FINDER in sys.meta_path:
        sys.meta_path.remove(_FINDER)
    for name in _SERVED:
        if isinstance(sys.modules.get(name), _Module):
            del sys.modules[name]
    sys.modules.pop(__package__, None)
