#!/bin/sh
# onnxruntime 1.24.4, onnx 1.23.2, numpy 2.4.6, Python 3.11, x86-64 with AMX (Intel Xeons from Sapphire Rapids on)
#
# Products of 8-bit integers (MatMulInteger, and with it every layer of a dynamically quantised model) have wrong numbers
# on processors with AMX in every 32nd row, in the last N % 16 columns of N, where that is not 0: some are sums that lack
# their last terms, others unset memory, without an error. Quantised models give noise or NaN. 1.22.1, 1.23.0, 1.23.2,
# 1.24.1 and 1.24.4 do so, 1.25.0 and 1.31.1 do not. 1.23.2 is the last release for Python 3.10.
#
# Seen, wrong numbers of a product of random (M, 64) and (64, N):
#   M = 64, N = 24: 16
#   M = 64, N = 32: 0
#   M = 31, N = 24: 0
set -eu
grep -q amx_int8 /proc/cpuinfo || { echo 'this processor has no AMX, on which alone it shows'; exit 2; }
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 130' INT TERM
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile numpy==2.4.6 onnx==1.23.2 onnxruntime==1.24.4
"$dir/venv/bin/python" - <<'EOF'
import sys

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

rng = np.random.default_rng(0)


def wrong(rows, columns):
    left = rng.integers(0, 256, (rows, 64), dtype=np.uint8)
    right = rng.integers(0, 256, (64, columns), dtype=np.uint8)
    graph = helper.make_graph(
        [helper.make_node('MatMulInteger', ['left', 'right'], ['product'])],
        'product',
        [helper.make_tensor_value_info('left', TensorProto.UINT8, left.shape)],
        [helper.make_tensor_value_info('product', TensorProto.INT32, [rows, columns])],
        [numpy_helper.from_array(right, 'right')],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 18)], ir_version=9)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=['CPUExecutionProvider'])
    (product,) = session.run(None, {'left': left})
    return int((product != left.astype(np.int32) @ right.astype(np.int32)).sum())


found = {shape: wrong(*shape) for shape in [(64, 24), (64, 32), (31, 24)]}
for (rows, columns), count in found.items():
    print(f'M = {rows}, N = {columns}: {count}')
sys.exit(not (found[64, 24] > 0 and found[64, 32] == found[31, 24] == 0))
EOF
