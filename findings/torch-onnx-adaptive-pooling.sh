#!/bin/sh
# torch 2.13.0 (CPU), onnx 1.23.2, onnxscript 0.7.2, onnxruntime 1.31.1, numpy 2.4.6, Python 3.11, x86-64
#
# torch.onnx.export(dynamo=True) takes adaptive_avg_pool2d with dynamic height and width without a word. The graph is
# right at the size that it was traced with. At others it gives wrong averages, or stops with an index out of range,
# although its inputs are declared to be of any size. UPerNet's and PSPNet's pooling heads are made of this operator.
# torch.export's own program is right at every size.
#
# Seen, traced at 17 x 19, pooled to 3 x 3, the values from 0 to 1 along the width (largest difference from PyTorch):
#   17 x 19: torch.export 0.00, onnxruntime 0.00
#   34 x 38: torch.export 0.00, onnxruntime 0.60
#   16 x 18: torch.export 0.00, onnxruntime refuses: invalid index found
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


class Pool(nn.Module):
    def forward(self, x):
        return nn.functional.adaptive_avg_pool2d(x, 3)


def ramp(height, width):
    return torch.linspace(0, 1, width).expand(1, 1, height, width).contiguous()


sizes = ({2: Dim.DYNAMIC, 3: Dim.DYNAMIC},)
program = torch.export.export(Pool(), (ramp(17, 19),), dynamic_shapes=sizes).module()
graph = torch.onnx.export(Pool(), (ramp(17, 19),), dynamic_shapes=sizes, dynamo=True, opset_version=18, verbose=False)
options = onnxruntime.SessionOptions()
options.log_severity_level = 4
session = onnxruntime.InferenceSession(
    graph.model_proto.SerializeToString(), options, providers=['CPUExecutionProvider'])
seen = []
for height, width in (17, 19), (34, 38), (16, 18):
    x = ramp(height, width)
    exported = float((program(x) - Pool()(x)).abs().max())
    try:
        output = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
        seen.append(float((torch.from_numpy(output) - Pool()(x)).abs().max()))
        text = f' {seen[-1]:.2f}'
    except Exception as error:
        seen.append('invalid index found' in str(error))
        text = ' refuses: invalid index found' if seen[-1] else f': {error}'
    print(f'{height} x {width}: torch.export {exported:.2f}, onnxruntime{text}')
    if exported > 1e-6:
        sys.exit(1)
sys.exit(not (seen[0] < 1e-6 and 0.01 < seen[1] < 1 and seen[2] is True))
EOF
