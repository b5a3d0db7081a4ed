"""The two loops of :mod:`ssm_backbones.onnx_export.decompositions` as ONNX's standard ``Scan``.

PyTorch's exporter translates them to placeholders, because a custom translation cannot build loops; then each
placeholder is replaced in the finished graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnxscript import values

OPSET = 18
_DOMAIN = 'ssm_export'


def translations() -> dict[Any, Callable[..., Any]]:
    """Return the placeholders, for ``torch.onnx.export(custom_translation_table=...)``."""
    line = _placeholder('line', ['decay', 'inflow'], 'reverse')
    front = _placeholder('front', ['left', 'top', 'inflow'])

    def along(decay, inflow, reverse=False):
        return line(decay, inflow, reverse=int(reverse))

    return {
        torch.ops.ssm_export.line.default: along,
        torch.ops.ssm_export.front.default: lambda left, top, inflow: front(left, top, inflow),
    }


def _placeholder(name: str, inputs: Sequence[str], *attributes: str) -> values.Op:
    schema = onnx.defs.OpSchema(
        name,
        _DOMAIN,
        1,
        inputs=[onnx.defs.OpSchema.FormalParameter(each, 'T') for each in inputs],
        outputs=[onnx.defs.OpSchema.FormalParameter('states', 'T')],
        type_constraints=[('T', ['tensor(float)'], 'float32')],
        attributes=[
            onnx.defs.OpSchema.Attribute(each, onnx.defs.OpSchema.AttrType.INT, required=False) for each in attributes
        ],
    )
    return values.Op(values.Opset(_DOMAIN, 1), name, schema)


def replace_placeholders(model: ir.Model) -> int:
    """Replace every placeholder in a model by a ``Scan``, in place.

    Returns:
        The number of replaced placeholders.
    """
    placeholders = [node for node in model.graph if node.domain == _DOMAIN and node.op_type in _BODIES]
    for number, node in enumerate(placeholders):
        body = _BODIES[node.op_type](f'{node.op_type}{number}')
        sequences = [value for value in node.inputs if value is not None]
        reverse = 'reverse' in node.attributes and bool(node.attributes['reverse'].as_int())
        nodes, states = _scan(body, sequences, node.outputs[0], reverse)
        ir.convenience.replace_nodes_and_values(model.graph, node, [node], nodes, [node.outputs[0]], [states])
    if not any(node.domain == _DOMAIN for node in model.graph):
        model.graph.opset_imports.pop(_DOMAIN, None)
    return len(placeholders)


def _line(name: str) -> _Body:
    """Build the body of ``h_l = decay_l * h_{l-1} + inflow_l``."""
    body = _Body(name, ['state', 'decay', 'inflow'])
    state, decay, inflow = body.inputs
    body.finish(body.add('Add', body.add('Mul', state, decay), inflow))
    return body


def _front(name: str) -> _Body:
    """Build the body of ``h_l[i] = left_l[i] * h_{l-1}[i] + top_l[i] * h_{l-1}[i-1] + inflow_l[i]``."""
    body = _Body(name, ['state', 'left', 'top', 'inflow'])
    state, left, top, inflow = body.inputs
    start, one, end = body.constant(0), body.constant(1), body.constant(-1)
    # The row above the first one is zero.
    row = body.add('Slice', state, start, one, start)
    above = body.add('Concat', body.add('Sub', row, row), body.add('Slice', state, start, end, start), axis=0)
    moved = body.add('Add', body.add('Mul', state, left), body.add('Mul', above, top))
    body.finish(body.add('Add', moved, inflow))
    return body


class _Body:
    """Builder of the body graph of a ``Scan``: inputs are the state and then the position's elements.

    Nodes have to use the inputs in that order, in which OpenVINO binds them (findings/openvino-scan-inputs.sh).
    """

    def __init__(self, name: str, inputs: Sequence[str]) -> None:
        self.name = name
        self.inputs = [ir.Value(name=f'{name}_{each}', type=ir.TensorType(ir.DataType.FLOAT)) for each in inputs]
        self.nodes: list[Any] = []
        self.graph: Any = None

    def add(self, kind: str, *inputs: Any, **attributes: Any) -> Any:
        """Add a node and return its output."""
        name = f'{self.name}_{len(self.nodes)}'
        output = ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT))
        self.nodes.append(ir.node(kind, inputs, attributes, outputs=[output], name=f'{name}_{kind}'))
        return output

    def constant(self, value: int) -> Any:
        """Add a constant vector of one integer and return it."""
        output = self.add('Constant', value=ir.tensor([value], dtype=ir.DataType.INT64))
        output.type = ir.TensorType(ir.DataType.INT64)
        return output

    def finish(self, state: Any) -> None:
        """Set the next state, which is also the step's output."""
        copy = self.add('Identity', state)
        self.graph = ir.Graph(self.inputs, [state, copy], nodes=self.nodes, opset_imports={'': OPSET}, name=self.name)


def _scan(
    body: _Body, sequences: Sequence[ir.Value], output: ir.Value, reverse: bool
) -> tuple[list[ir.Node], ir.Value]:
    """Build the nodes that scan over the first axis, or from its end, from a zero state; return them and all states."""
    outer = _Body(f'{body.name}_start', [])
    start, one = outer.constant(0), outer.constant(1)
    first = outer.add('Squeeze', outer.add('Slice', sequences[-1], start, one, start), start)
    zeros = outer.add('Sub', first, first)
    last = ir.Value(name=f'{body.name}_last', type=output.type)
    states = ir.Value(name=f'{body.name}_states', type=output.type, shape=output.shape)
    attributes: dict[str, Any] = dict(body=body.graph, num_scan_inputs=len(sequences))
    if reverse:
        attributes.update(scan_input_directions=[1] * len(sequences), scan_output_directions=[1])
    scan = ir.node('Scan', [zeros, *sequences], attributes, outputs=[last, states], name=f'{body.name}_scan')
    return [*outer.nodes, scan], states


_BODIES = {'line': _line, 'front': _front}
