"""Override torch functions within a context."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.overrides import TorchFunctionMode


class FunctionOverrideMode(TorchFunctionMode):
    """Context in which calls of some of PyTorch's functions and operators are replaced.

    It also applies while ``torch.export`` traces a module: the program then contains the replacements. Decomposing the
    finished program (``ExportedProgram.run_decompositions``) would trace it once more.

    Args:
        table: Maps functions, and operators as ``torch.ops.namespace.name``, to their replacements.
    """

    def __init__(self, table: Mapping[Any, Callable[..., Any]]) -> None:
        super().__init__()
        self._table = dict(table)

    def __torch_function__(
        self, function: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return self._table.get(function, function)(*args, **(kwargs or {}))
