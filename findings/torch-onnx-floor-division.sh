#!/bin/sh
# torch 2.13.0 (CPU), onnx 1.23.2, onnxscript 0.7.2, onnxruntime 1.31.1, numpy 2.4.6, Python 3.11, x86-64
#
# Where a size is dynamic, torch.onnx.export(dynamo=True) writes Python's floor division of sizes as a division that
# rounds towards zero. The usual idiom for rounding up, -(-size // 4), then rounds down: a graph that pads images to a
# multiple of 4 crops them instead. The export succeeds; torch.export's own program is right, and so is the division of
# tensors of integers. (size + 3) // 4 has no negative numbers and avoids it.
#
# Seen, an image of 17 x 19 padded to multiples of 4 by -(-size // 4) * 4:
#   PyTorch (20, 20), torch.export (20, 20), onnxruntime (16, 16)
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
from torch.export import Dim


class Pad(nn.Module):
    def forward(self, x):
        height, width = x.shape[2:]
        return nn.functional.pad(x, (0, -(-width // 4) * 4 - width, 0, -(-height // 4) * 4 - height))


image = torch.ones(1, 3, 17, 19)
sizes = ({2: Dim.DYNAMIC, 3: Dim.DYNAMIC},)
program = torch.export.export(Pad(), (image,), dynamic_shapes=sizes)
graph = torch.onnx.export(Pad(), (image,), dynamic_shapes=sizes, dynamo=True, opset_version=18, verbose=False)
session = onnxruntime.InferenceSession(graph.model_proto.SerializeToString(), providers=['CPUExecutionProvider'])
results = Pad()(image), program.module()(image), session.run(None, {session.get_inputs()[0].name: image.numpy()})[0]
seen = [tuple(result.shape[2:]) for result in results]
print('PyTorch {}, torch.export {}, onnxruntime {}'.format(*seen))
sys.exit(seen != [(20, 20), (20, 20), (16, 16)])
EOF
