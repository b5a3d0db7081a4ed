"""Translate blocks that are alike once, since nearly all of an export's time is spent on blocks.

While the model is traced each of these blocks is one operator, ``ssm_export::block``. One block of each kind is
exported by itself, with its parameters as inputs, and becomes a function of ONNX, which is inlined in the place of
every such operator.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes import common
from onnxscript import values
from torch import Tensor, nn
from torch.func import functional_call

from ssm_backbones.backbones.base import Stage

_LIBRARY = torch.library.Library('ssm_export', 'FRAGMENT')
_LIBRARY.define('block(Tensor x, int number) -> Tensor')
_DOMAIN = 'ssm_export'


@torch.library.register_fake('ssm_export::block', lib=_LIBRARY)
def _(x: Tensor, number: int) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@dataclass(frozen=True)
class Kind:
    """Blocks that differ in their parameters' values alone.

    Attributes:
        blocks: The blocks.
        paths: Their names in the module.
        example: An input of the first one, (B, H, W, C).
    """

    blocks: tuple[nn.Module, ...]
    paths: tuple[str, ...]
    example: Tensor


class Block(nn.Module):
    """A block as a function of its input and all its parameters and buffers, in the order of :func:`_state`."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        # Not as a submodule: its parameters are inputs.
        self.__dict__['block'] = block

    def forward(self, x: Tensor, *state: Tensor) -> Any:
        block = self.__dict__['block']
        return functional_call(block, dict(zip(_state(block), state, strict=True)), (x,))


def repeated_blocks(module: nn.Module, images: Tensor) -> list[Kind]:
    """Return the kinds of blocks that a module has several of, by a run on images."""
    paths = {block: path for path, block in module.named_modules()}
    blocks = [block for stage in module.modules() if isinstance(stage, Stage) for block in stage.blocks]
    inputs: dict[nn.Module, Tensor | None] = {}

    def note(block: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        fits = len(arguments) == 1 and isinstance(output, Tensor) and output.shape == arguments[0].shape
        # A block that runs twice, or is more than a function of a map, is traced as usual.
        inputs[block] = arguments[0] if fits and block not in inputs else None

    observed = [
        block
        for block in blocks
        if not block._forward_hooks and not block._forward_pre_hooks and 'forward' not in vars(block)
    ]
    handles = [block.register_forward_hook(note) for block in observed]
    try:
        with torch.no_grad():
            module(images)
    finally:
        for handle in handles:
            handle.remove()
    kinds: dict[Any, list[nn.Module]] = {}
    for block in observed:
        example = inputs.get(block)
        if example is not None:
            kinds.setdefault((tuple(example.shape), *_signature(block)), []).append(block)
    found = []
    for alike in kinds.values():
        example = inputs[alike[0]]
        if len(alike) > 1 and example is not None:
            found.append(Kind(tuple(alike), tuple(paths[block] for block in alike), example.clone()))
    return found


@contextlib.contextmanager
def as_operators(kinds: list[Kind]) -> Iterator[None]:
    """Make each block one operator, numbered over all kinds."""
    numbered = list(enumerate(block for kind in kinds for block in kind.blocks))

    def stand_in(number: int) -> Callable[[Tensor], Tensor]:
        return lambda x: torch.ops.ssm_export.block(x, number)

    for number, block in numbered:
        block.forward = stand_in(number)
    try:
        yield
    finally:
        for _, block in numbered:
            del block.forward


def translations() -> dict[Any, Callable[..., Any]]:
    """Return the placeholder, for ``torch.onnx.export(custom_translation_table=...)``."""
    schema = onnx.defs.OpSchema(
        'block',
        _DOMAIN,
        1,
        inputs=[onnx.defs.OpSchema.FormalParameter('x', 'T')],
        outputs=[onnx.defs.OpSchema.FormalParameter('y', 'T')],
        type_constraints=[('T', ['tensor(float)', 'tensor(float16)'], 'floating')],
        attributes=[onnx.defs.OpSchema.Attribute('number', onnx.defs.OpSchema.AttrType.INT, required=True)],
    )
    block = values.Op(values.Opset(_DOMAIN, 1), 'block', schema)
    return {torch.ops.ssm_export.block.default: lambda x, number: block(x, number=number)}


def insert_blocks(
    model: ir.Model, kinds: list[Kind], translate: Callable[[nn.Module, tuple[Tensor, ...]], Any]
) -> None:
    """Put the blocks in the places of their operators.

    Args:
        model: The graph with the operators.
        kinds: Those of :func:`repeated_blocks`.
        translate: Translates a module, called with example inputs.
    """
    if not kinds:
        return
    calls = {node.attributes['number'].as_int(): node for node in model.graph if node.op_type == 'block'}
    first = 0
    for place, kind in enumerate(kinds):
        # Blocks without a use are not in the graph: those of stages behind the last one that a head takes.
        used = [
            (number, block, path)
            for number, (block, path) in enumerate(zip(kind.blocks, kind.paths, strict=True), first)
            if number in calls
        ]
        first += len(kind.blocks)
        if not used:
            continue
        state = tuple(value.detach() for value in _state(kind.blocks[0]).values())
        name = f'Block{place}'
        graph = translate(Block(kind.blocks[0]), (kind.example, *state)).graph
        # Functions have no initializers: those become inputs, and are shared by the calls.
        constants = list(graph.initializers.values())
        graph.initializers.clear()
        graph.inputs.extend(constants)
        model.functions[_DOMAIN, name, ''] = ir.Function(_DOMAIN, name, graph=graph, attributes=[])
        shared = [_initializer(model, f'{name}.{each.name}', each.const_value) for each in constants]
        for number, block, path in used:
            node = calls[number]
            own = [
                _initializer(model, f'{path}.{key}', ir.tensor(value.detach().cpu().numpy()))
                for key, value in _state(block).items()
            ]
            output = node.outputs[0]
            call = ir.node(name, [node.inputs[0], *own, *shared], domain=_DOMAIN, name=f'{name}.{number}')
            call.outputs[0].type, call.outputs[0].shape = output.type, output.shape
            ir.convenience.replace_nodes_and_values(model.graph, node, [node], [call], [output], [call.outputs[0]])
            call.outputs[0].name = f'{name}.{number}.output'
    common.InlinePass()(model)
    _transpose_weights(model)
    model.graph.opset_imports.pop(_DOMAIN, None)


def _transpose_weights(model: ir.Model) -> None:
    """Transpose initializers once: tools that quantise look for weights that are a matrix product's own input."""
    for node in [node for node in model.graph if node.op_type == 'Transpose']:
        source, output = node.inputs[0], node.outputs[0]
        tensor = None if source is None or not source.is_initializer() else source.const_value
        if source is None or tensor is None or output.is_graph_output():
            continue
        order = node.attributes['perm'].as_ints() if 'perm' in node.attributes else None
        values_of = np.ascontiguousarray(tensor.numpy().transpose(order))
        made = _initializer(model, f'{source.name}.{output.name}', ir.tensor(values_of))
        ir.convenience.replace_all_uses_with(output, made)
        model.graph.remove(node, safe=True)
        if not source.uses() and source.name is not None:
            del model.graph.initializers[source.name]


def _initializer(model: ir.Model, name: str, tensor: Any) -> ir.Value:
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
    model.graph.register_initializer(value)
    return value


def _state(block: nn.Module) -> dict[str, Tensor]:
    return {**dict(block.named_parameters()), **dict(block.named_buffers())}


def _signature(block: nn.Module) -> tuple[Any, ...]:
    """Return what blocks of a kind have in common: types, attributes, and their state's shapes."""
    parts: list[Any] = [(name, value.shape, value.dtype) for name, value in _state(block).items()]
    for name, module in block.named_modules():
        # The rate at which training drops branches has no meaning in a graph.
        own = {key: value for key, value in vars(module).items() if not key.startswith('_') and key != 'drop_prob'}
        simple = {key: value if isinstance(value, _SIMPLE) else id(value) for key, value in own.items()}
        hooks = bool(module._forward_hooks or module._forward_pre_hooks)
        parts.append((name, type(module), tuple(sorted(simple.items())), id(module) if hooks else None))
    return tuple(parts)


_SIMPLE = (bool, int, float, str, tuple, type(None))
