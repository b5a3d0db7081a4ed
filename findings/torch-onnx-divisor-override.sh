#!/bin/sh
# torch 2.13.0 (CPU), onnx 1.23.2, onnxscript 0.7.2, onnxruntime 1.31.1, numpy 2.4.6, Python 3.11, x86-64
#
# ONNX has no counterpart for the divisor_override of avg_pool2d. torch.onnx.export(dynamo=True) leaves it out and
# exports a plain average: no error, no warning. (The trick sums a window by divisor_override=1.)
#
# Seen, windows of 2 x 2 over ones:
#   PyTorch 4.0, onnxruntime 1.0
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 130' INT TERM
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile \
    numpy==2.4.6 torch==2.13.0 onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.31.1
"$dir/venv/bin/python" - <<'EOF'
import sys

import onnxruntime
import torch
from torch import nn


class Sum(nn.Module):
    def forward(self, x):
        return nn.functional.avg_pool2d(x, 2, divisor_override=1)


image = torch.ones(1, 1, 4, 4)
graph = torch.onnx.export(Sum(), (image,), dynamo=True, opset_version=18, verbose=False)
session = onnxruntime.InferenceSession(graph.model_proto.SerializeToString(), providers=['CPUExecutionProvider'])
output = session.run(None, {session.get_inputs()[0].name: image.numpy()})[0]
seen = Sum()(image).max().item(), float(output.max())
print('PyTorch {}, onnxruntime {}'.format(*seen))
sys.exit(seen != (4.0, 1.0))
EOF
