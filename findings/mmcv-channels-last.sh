#!/bin/sh
# mmcv 2.1.0 (compiled for the CPU), torch 2.13.0 (CPU), numpy 2.4.6, Python 3.11, x86-64, g++ 12
# Compiling mmcv takes about 20 minutes of a core the first time; pip keeps the result.
#
# mmcv's RoIAlign and its modulated deformable convolution read a channels-last map's memory as if it were laid out
# (batch, channels, height, width). Values are the tensor's in another order: no error, no warning. The plain deformable
# convolution next to them refuses such a map ("input must be contiguous"), and torch's own operators take any layout,
# as a model after .to(memory_format=torch.channels_last) expects. Tensor.contiguous avoids it.
#
# Seen, largest difference between a map and the same map in channels-last, of values from a normal distribution:
#   roi_align 1.5, modulated_deform_conv2d 5.8
#   deform_conv2d: RuntimeError: input must be contiguous
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 130' INT TERM
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile numpy==2.4.6 torch==2.13.0 setuptools==80.9.0 wheel==0.45.1 \
    packaging==26.3 ninja==1.13.2 psutil==7.2.2
"$dir/venv/bin/pip" install --quiet --no-compile --no-build-isolation mmengine==0.10.7 mmcv==2.1.0
"$dir/venv/bin/python" - <<'EOF'
import sys

import torch
from mmcv.ops import deform_conv2d, modulated_deform_conv2d, roi_align

torch.manual_seed(0)
image, weight, offset = torch.randn(1, 4, 6, 6), torch.randn(4, 4, 3, 3), torch.randn(1, 18, 6, 6)
boxes = torch.tensor([[0.0, 0.0, 0.0, 5.0, 5.0]])
mask = torch.full((1, 9, 6, 6), 0.5)
operators = (
    lambda x: roi_align(x, boxes, (3, 3), 1.0, 0, 'avg', True),
    lambda x: modulated_deform_conv2d(x, offset, mask, weight, None, 1, 1, 1, 1, 1),
)
last = image.to(memory_format=torch.channels_last)
seen = [(run(image) - run(last)).abs().max().item() for run in operators]
print('roi_align {:.1f}, modulated_deform_conv2d {:.1f}'.format(*seen))
try:
    deform_conv2d(last, offset, weight, 1, 1, 1)
    sys.exit('deform_conv2d takes channels-last maps now')
except RuntimeError as error:
    print(f'deform_conv2d: RuntimeError: {error}')
sys.exit(min(seen) < 0.1)
EOF
