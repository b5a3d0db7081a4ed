#!/bin/sh
# openvino 2026.4.1, onnx 1.23.2, onnxruntime 1.31.1, numpy 2.4.6, Python 3.11, x86-64
#
# ONNX binds the inputs of a Scan's body by their order in the body's declaration: states first, then a slice of each
# scanned input. OpenVINO binds them in the order in which the body's nodes use them. A recurrence h = a * h + b whose
# body says Mul(a, h) gets a and h exchanged, and converts, compiles and runs without a word where their shapes agree;
# Mul(h, a) is right. A body that begins with Identity nodes for its inputs, in their order, is right as well.
#
# Seen, h = a * h + b over 5 steps (largest difference from numpy):
#   Mul(h, a): onnxruntime 0.00, OpenVINO 0.00
#   Mul(a, h): onnxruntime 0.00, OpenVINO 0.78
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 130' INT TERM
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile numpy==2.4.6 onnx==1.23.2 onnxruntime==1.31.1 openvino==2026.4.1
cd "$dir"
"$dir/venv/bin/python" - <<'EOF'
import sys

import numpy as np
import onnx
import onnxruntime
import openvino
from onnx import TensorProto, helper


def value(name, *shape):
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def recurrence(factors):
    """Return a model of one Scan, h = a * h + b, whose product has its factors in this order."""
    body = helper.make_graph(
        [helper.make_node('Mul', factors, ['decayed']),
         helper.make_node('Add', ['decayed', 'b'], ['next']),
         helper.make_node('Identity', ['next'], ['output'])],
        'body', [value('h', 3), value('a', 3), value('b', 3)], [value('next', 3), value('output', 3)])
    scan = helper.make_node('Scan', ['start', 'decay', 'inflow'], ['last', 'states'], body=body, num_scan_inputs=2)
    graph = helper.make_graph(
        [scan], 'graph', [value('start', 3), value('decay', 5, 3), value('inflow', 5, 3)],
        [value('last', 3), value('states', 5, 3)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 18)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model


generator = np.random.default_rng(0)
inputs = dict(start=generator.random(3, np.float32), decay=generator.random((5, 3), np.float32),
              inflow=generator.random((5, 3), np.float32))
state, expected = inputs['start'], []
for decay, inflow in zip(inputs['decay'], inputs['inflow']):
    state = decay * state + inflow
    expected.append(state)

seen = []
for factors in ['h', 'a'], ['a', 'h']:
    onnx.save(recurrence(factors), 'scan.onnx')
    session = onnxruntime.InferenceSession('scan.onnx', providers=['CPUExecutionProvider'])
    compiled = openvino.Core().compile_model(openvino.convert_model('scan.onnx'), 'CPU')
    results = session.run(['states'], inputs)[0], compiled(inputs)['states']
    seen.append([float(abs(result - np.stack(expected)).max()) for result in results])
    print('Mul({}, {}): onnxruntime {:.2f}, OpenVINO {:.2f}'.format(*factors, *seen[-1]))
sys.exit(not (max(seen[0]) < 1e-6 and seen[1][0] < 1e-6 and seen[1][1] > 0.01))
EOF
