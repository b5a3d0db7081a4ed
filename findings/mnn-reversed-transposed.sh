#!/bin/sh
# MNN 3.6.1, onnx 1.23.2, Python 3.11, Linux
#
# An ONNX Slice with a step of -1 reverses a dimension. MNN's converter takes it, and the result is right where the
# dimension is reversed before a Transpose makes it the first one. Reversed after the Transpose, it holds other values,
# without an error: here the reversal of a sequence that came out of a map's columns.
#
# Seen:
#   reversed, then transposed: right
#   transposed, then reversed: wrong
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 130' INT TERM
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile mnn==3.6.1 onnx==1.23.2 numpy==2.4.6
cat > "$dir/reverse.py" <<'EOF2'
import subprocess
import sys

import MNN
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

SHAPE = (1, 3, 8, 12)


def numbers(name, *values):
    return numpy_helper.from_array(np.array(values, np.int64), name)


def run(first, folder):
    """Double a tensor, reverse its length before or after it becomes the first dimension, and bring it back."""
    axis, order = (3, ['Slice', 'Transpose']) if first == 'reverse' else (0, ['Transpose', 'Slice'])
    nodes, last = [helper.make_node('Mul', ['x', 'two'], ['m'])], 'm'
    for index, kind in enumerate(order):
        inputs = [last] if kind == 'Transpose' else [last, 'start', 'end', 'axis', 'step']
        attributes = {'perm': [3, 0, 1, 2]} if kind == 'Transpose' else {}
        nodes.append(helper.make_node(kind, inputs, [f't{index}'], **attributes))
        last = f't{index}'
    nodes.append(helper.make_node('Transpose', [last], ['y'], perm=[1, 2, 3, 0]))
    two = numpy_helper.from_array(np.array(2, np.float32), 'two')
    constants = [two, numbers('start', -1), numbers('end', -(2**31)), numbers('axis', axis), numbers('step', -1)]
    shape = [helper.make_tensor_value_info(name, TensorProto.FLOAT, SHAPE) for name in 'xy']
    graph = helper.make_graph(nodes, 'reverse', shape[:1], shape[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 18)], ir_version=9)
    onnx.checker.check_model(model)
    source, target = f'{folder}/{first}.onnx', f'{folder}/{first}.mnn'
    onnx.save(model, source)
    convert = [sys.executable, '-m', 'MNN.tools.mnnconvert', '-f', 'ONNX', '--bizCode', 'MNN']
    subprocess.run([*convert, '--modelFile', source, '--MNNModel', target], check=True, capture_output=True)
    x = np.arange(np.prod(SHAPE), dtype=np.float32).reshape(SHAPE)
    net = MNN.nn.load_module_from_file(target, ['x'], ['y'])
    (y,) = net.onForward([MNN.expr.const(x, list(SHAPE), MNN.expr.NCHW)])
    return np.array_equal(np.array(y.read()).reshape(SHAPE), 2 * x[..., ::-1])


for first, text in (('reverse', 'reversed, then transposed'), ('transpose', 'transposed, then reversed')):
    print(f'{text}: {"right" if run(first, sys.argv[1]) else "wrong"}', flush=True)
EOF2
"$dir/venv/bin/python" "$dir/reverse.py" "$dir" 2> "$dir/log" | grep ed, | tee "$dir/out" || { cat "$dir/log" >&2; exit 1; }
printf '%s\n' 'reversed, then transposed: right' 'transposed, then reversed: wrong' | cmp -s - "$dir/out"
