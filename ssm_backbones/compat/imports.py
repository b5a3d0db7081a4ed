"""Run a function when a library is imported, or something around its import; which version is installed."""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any


def installed_version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


class ImportObserver(importlib.abc.MetaPathFinder):
    """Finds one module as the import system does, and has it executed within a context.

    Args:
        name: The module's.
        context: Called before the module is executed.
        function: Called with the module afterwards.
    """

    def __init__(
        self,
        name: str,
        context: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
        function: Callable[[ModuleType], None] = lambda module: None,
    ) -> None:
        self.name = name
        self.context = context
        self.function = function
        self.searching = False

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        # A library is often looked for without being imported.
        if fullname != self.name or self.searching:
            return None
        self.searching = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.searching = False
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                sys.meta_path.remove(self)
                with self.context():
                    execute(module)
                self.function(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def after_import(name: str, function: Callable[[ModuleType], None]) -> None:
    """Call a function with a module, now if it has been imported, else as soon as it is."""
    if name in sys.modules:
        function(sys.modules[name])
    else:
        sys.meta_path.insert(0, ImportObserver(name, function=function))
