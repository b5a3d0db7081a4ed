"""Other functions in the place of some, for whatever is called meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.overrides import TorchFunctionMode


class FunctionOverrideMode(TorchFunctionMode):
    """While it is active, calls of some of PyTorch's functions and operators go to others.

    Also while ``torch.export`` traces a module: the program then holds what the replacements consist of. Decomposing
    the finished program (``ExportedProgram.run_decompositions``) would trace it once more.

    Args:
        table: what to call instead; operators as they are called, ``torch.ops.namespace.name``.
    """

    def __init__(self, table: Mapping[Any, Callable[..., Any]]) -> None:
        super().__init__()
        self._table = dict(table)

    def __torch_function__(
        self, function: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return self._table.get(function, function)(*args, **(kwargs or {}))
