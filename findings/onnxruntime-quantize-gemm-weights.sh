#!/bin/sh
# onnxruntime 1.31.1, onnx 1.23.2, numpy 2.4.6, Python 3.11, x86-64
#
# A graph may state the shape of a weight in value_info, as PyTorch's exporter does for each one; onnx's checker takes it
# and onnxruntime runs it. onnxruntime.quantization.quantize_dynamic refuses the file where the weight is the transposed
# one of a Gemm (transB=1, every nn.Linear on two dimensions): it transposes the weight, leaves the shape as it was, and
# stops at a shape inference error that names no node. The same file without value_info is quantised.
#
# Seen:
#   without value_info: quantised
#   with the weight's shape in value_info: Inferred shape and existing shape differ in dimension 0: (4) vs (6)
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 130' INT TERM
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile numpy==2.4.6 onnx==1.23.2 onnxruntime==1.31.1
cd "$dir"
"$dir/venv/bin/python" - <<'EOF'
import logging
import sys

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic

logging.disable(logging.WARNING)


def value(name, *shape):
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


weight = np.random.default_rng(0).random((6, 4), np.float32)
x = np.ones((1, 4), np.float32)
seen = []
for label, stated in ('without value_info', []), ("with the weight's shape in value_info", [value('weight', 6, 4)]):
    graph = helper.make_graph(
        [helper.make_node('Gemm', ['x', 'weight'], ['y'], transB=1)], 'graph', [value('x', 1, 4)], [value('y', 1, 6)],
        [numpy_helper.from_array(weight, 'weight')], value_info=stated)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 18)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, 'model.onnx')
    session = onnxruntime.InferenceSession('model.onnx', providers=['CPUExecutionProvider'])
    assert np.allclose(session.run(None, {'x': x})[0], x @ weight.T)
    try:
        quantize_dynamic('model.onnx', 'quantised.onnx', weight_type=QuantType.QUInt8)
        seen.append('quantised')
    except Exception as error:
        seen.append(str(error).strip().splitlines()[0].partition('] ')[2])
    print(f'{label}: {seen[-1]}')
sys.exit(not (seen[0] == 'quantised' and 'differ in dimension 0' in seen[1]))
EOF
