"""Support for symbolic tracing by ``torch.fx``, which knows no sizes and cannot follow what depends on them."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from torch.fx import Proxy

Function = TypeVar('Function', bound=Callable[..., Any])


def as_one_node(function: Function) -> Function:
    """Decorate a function of a module so that ``torch.fx`` records a call of it as one node and does not enter it."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        for value in (*args, *kwargs.values()):
            if isinstance(value, Proxy):
                return value.tracer.create_proxy('call_function', call, args, kwargs)
        return function(*args, **kwargs)

    return call  # type: ignore[return-value]
