"""Differentiate the operators in every way that PyTorch offers: backward, forward mode, ``torch.func``, ``vmap``.

``torch.library.register_autograd`` knows the backward pass alone: forward mode loses its tangents there without a
word, and the transforms of ``torch.func`` are refused. The kernel registered here serves the dispatcher's Autograd key
itself, so that it runs once for each level of nested transforms, as those of PyTorch's own operators do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from cuda_ops import _torch_compat

Arguments = Sequence[Any]
_TWICE = (
    'the scans have no second derivatives: {} is not differentiable in {}. Compute within '
    '`with cuda_ops.use_reference():`, whose PyTorch operations have derivatives of any order'
)


def register(
    library: torch.library.Library,
    name: str,
    *,
    save: Callable[[Any, Arguments, Any], None],
    backward: Callable[..., tuple[Any, ...]],
    forward_mode: Callable[..., Sequence[Tensor | None]],
    prepare: Callable[[Arguments], Arguments],
) -> None:
    """Make a defined operator ``cuda_ops::name`` differentiable.

    Args:
        library: where the operator was defined.
        name: the operator's.
        save: called with a context, the arguments and the outputs, to save what ``backward`` needs.
        backward: called with the context and the gradients of the outputs, returns those of the arguments.
        forward_mode: called with the arguments (dual tensors among them), their primals and their tangents, returns
            the tangents of the first outputs.
        prepare: changes the arguments of a call that a backward pass may follow.
    """
    operator = getattr(torch.ops.cuda_ops, name).default
    defaults = tuple(argument.default_value for argument in operator._schema.arguments)
    results = len(operator._schema.returns)

    def call_kernel(keyset: Any, arguments: Arguments) -> tuple[Tensor, ...]:
        return _torch_compat.call_below_autograd(operator, keyset, arguments)

    class Node(_SingleLevelFunction):
        @staticmethod
        def forward(ctx: Any, keyset: Any, transformed: bool, tangents: Any, *arguments: Any) -> tuple[Tensor, ...]:
            with _outer_derivatives() if transformed else nullcontext():
                outputs = call_kernel(keyset, arguments)
            ctx.tangents = tangents
            # Dual tensors are saved as they are, lest the tangents of gradients go missing without a word.
            save(ctx, arguments, outputs)
            return outputs

        @staticmethod
        def jvp(ctx: Any, *_: Any) -> tuple[Tensor | None, ...]:
            return ctx.tangents

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
            return None, None, None, *backward(ctx, *grads)

    Node.__name__ = Node.__qualname__ = name

    def kernel(keyset: Any, *arguments: Any) -> tuple[Tensor, ...]:
        # The dispatcher leaves out arguments that equal their defaults.
        arguments = (*arguments, *defaults[len(arguments) :])
        transformed = torch._C._are_functorch_transforms_active()
        tangents: tuple[Tensor | None, ...] | None = None
        # Asking each tensor takes as long as the rest of a small call. Under a dispatch mode, as while torch.compile
        # traces, Python does not know the level.
        if transformed or forward_ad._current_level >= 0 or torch._C._len_torch_dispatch_stack():
            duals = [_unpack(value) for value in arguments]
            if any(tangent is not None for _, tangent in duals):
                tangents = tuple(forward_mode(arguments, *zip(*duals, strict=True)))
                tangents += (None,) * (results - len(tangents))
        if torch.is_grad_enabled() and any(isinstance(value, Tensor) and value.requires_grad for value in arguments):
            arguments = tuple(prepare(arguments))
            with enable_single_level_autograd_function() if transformed else nullcontext():
                return Node.apply(keyset, transformed, tangents, *arguments)  # type: ignore[attr-defined]
        outputs = call_kernel(keyset, arguments)
        if tangents is None:
            return outputs
        return tuple(
            output if tangent is None else forward_ad.make_dual(output, tangent, level=0)
            for output, tangent in zip(outputs, tangents, strict=True)
        )

    _torch_compat.register_autograd_kernel(library, name, kernel)


@contextmanager
def _outer_derivatives() -> Iterator[None]:
    """Turn derivatives back on within a Function's forward, which turns them off: outer transforms need them."""
    with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
        yield


def _unpack(value: Any) -> tuple[Any, Tensor | None]:
    """Return the primal and the tangent of a dual tensor; for any other value itself and None."""
    if not isinstance(value, Tensor) or not torch._C._is_fwd_grad_enabled():
        return value, None
    # There is one level alone, 0.
    return tuple(forward_ad.unpack_dual(value, level=0))


def reference_tangents(reference: Callable[..., Sequence[Tensor]]) -> Callable[..., Sequence[Tensor | None]]:
    """Make the ``forward_mode`` of :func:`register` from a reference of PyTorch operations with the same arguments."""

    def forward_mode(arguments: Arguments, primals: Arguments, tangents: Arguments) -> list[Tensor | None]:
        return [_unpack(value)[1] for value in reference(*arguments)]

    return forward_mode


def push_forward(
    reference: Callable[..., Sequence[Tensor]], arguments: Arguments, tangents: Arguments
) -> tuple[Tensor, ...]:
    """Compute the tangents of a reference's outputs from its arguments' tangents, None for those that have none."""
    moving = [i for i, tangent in enumerate(tangents) if tangent is not None]

    def call(*values: Tensor) -> tuple[Tensor, ...]:
        filled = list(arguments)
        for i, value in zip(moving, values, strict=True):
            filled[i] = value
        return tuple(reference(*filled))

    return torch.func.jvp(call, tuple(arguments[i] for i in moving), tuple(tangents[i] for i in moving))[1]


class _Refuse(_SingleLevelFunction):
    """Pass a tensor through, and raise if its gradient is computed."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, name: str, argument: str) -> Tensor:
        ctx.names = name, argument
        with _outer_derivatives():
            return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        raise NotImplementedError(_TWICE.format(*ctx.names))


def register_linear(
    library: torch.library.Library,
    name: str,
    gradients: int,
    *,
    save: Callable[[Any, Arguments, Any], None],
    backward: Callable[..., tuple[Any, ...]],
) -> None:
    """Make a backward operator differentiable in the gradients that it takes first, and refuse the rest.

    It is linear in them, so their tangents pass through the operator itself. What it takes beside them it would have to
    be differentiated in for second derivatives.

    Args:
        library: where the operator was defined.
        name: the operator's.
        gradients: how many gradients it takes.
        save: see :func:`register`.
        backward: likewise; it returns the gradients of its first arguments alone.
    """
    operator = getattr(torch.ops.cuda_ops, name)
    names = [argument.name for argument in operator.default._schema.arguments]

    def refused(arguments: Arguments) -> Arguments:
        # Asked of each argument by itself, and not before its gradient is wanted: jvp by differentiating twice, as
        # torch.autograd.functional has it, wants that of the gradients alone.
        with enable_single_level_autograd_function():
            return [
                _Refuse.apply(value, name, names[i])  # type: ignore[attr-defined]
                if i >= gradients and isinstance(value, Tensor) and value.requires_grad
                else value
                for i, value in enumerate(arguments)
            ]

    def forward_mode(arguments: Arguments, primals: Arguments, tangents: Arguments) -> Sequence[Tensor]:
        for i, tangent in enumerate(tangents):
            if i >= gradients and tangent is not None:
                raise NotImplementedError(_TWICE.format(name, names[i]))
        moved = [
            torch.zeros_like(primal) if tangent is None and primal is not None else tangent
            for primal, tangent in zip(primals[:gradients], tangents, strict=False)
        ]
        return operator(*moved, *primals[gradients:])

    def all_backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        given = backward(ctx, *grads)
        return *given, *(None,) * (len(names) - len(given))

    register(library, name, save=save, backward=all_backward, forward_mode=forward_mode, prepare=refused)


def register_vmap(name: str, maps: Sequence[int], parameters: Sequence[int]) -> None:
    """Give an operator a rule for ``torch.vmap``.

    Where only maps are mapped over, the mapped dimension becomes a part of their batch; else the operator is called
    once for each index of it. Versions of torch that take no rules (before 2.5) always do the latter, and warn.

    Args:
        name: the operator's; all of its outputs are tensors with the batch in front.
        maps: the positions of the arguments that have the batch in front.
        parameters: those of the other tensors. A backward operator sums over the batch: all of its arguments are.
    """
    if not hasattr(torch.library, 'register_vmap'):
        return
    operator = getattr(torch.ops.cuda_ops, name)

    def rule(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        size = info.batch_size
        # What holds no tensor has a structure of its own there.
        dims: list[Any] = [
            dim if isinstance(value, Tensor) else None for value, dim in zip(arguments, in_dims, strict=True)
        ]
        if size and all(dims[i] is None for i in parameters if i < len(dims)):
            folded = list(arguments)
            for i in maps:
                if isinstance(value := arguments[i], Tensor):
                    value = value.expand(size, *value.shape) if dims[i] is None else value.movedim(dims[i], 0)
                    folded[i] = value.flatten(0, 1)
            outputs = tuple(output.unflatten(0, (size, -1)) for output in operator(*folded))
        else:
            # Of no samples at all the shapes are still wanted.
            calls = [
                operator(
                    *(
                        value
                        if dim is None
                        else value.select(dim, i)
                        if size
                        else value.new_zeros(value.movedim(dim, 0).shape[1:])
                        for value, dim in zip(arguments, dims, strict=True)
                    )
                )
                for i in range(max(size, 1))
            ]
            outputs = tuple(torch.stack(each)[:size] for each in zip(*calls, strict=True))
        return outputs, (0,) * len(outputs)

    torch.library.register_vmap(f'cuda_ops::{name}', rule)
