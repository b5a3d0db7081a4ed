#!/bin/sh
# mmsegmentation 1.2.2, mmcv 2.1.0, mmengine 0.10.7, torch 2.13.0 (CPU), numpy 2.4.6, Python 3.11, x86-64
# Compiling mmcv takes about 20 minutes of a core the first time; pip keeps the result.
#
# CrossEntropyLoss takes class_weight, and the heads pass ignore_index=255, but the two do not go together: to average,
# cross_entropy looks up the weight of each pixel's class before it leaves the ignored pixels out, so that the first
# label of 255 ends in an IndexError. With a negative ignore_index, which means the last classes to an index, nothing
# fails, and by default (avg_non_ignore=False) ignored pixels count in the average with a foreign class's weight.
#
# Seen, half of the pixels ignored, weights 1, 1 and 100, no pixel of the third class (torch's own function gives 1.10):
#   ignore_index 255: IndexError: index 255 is out of bounds for dimension 0 with size 3
#   ignore_index -1: 0.01
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 130' INT TERM
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile numpy==2.4.6 torch==2.13.0 setuptools==80.9.0 wheel==0.45.1 \
    packaging==26.3 ninja==1.13.2 psutil==7.2.2
"$dir/venv/bin/pip" install --quiet --no-compile --no-build-isolation mmengine==0.10.7 mmcv==2.1.0
"$dir/venv/bin/pip" install --quiet --no-compile prettytable==3.18.0 scipy==1.17.1 ftfy==6.3.1 regex==2026.11.15
"$dir/venv/bin/pip" install --quiet --no-compile --no-deps mmsegmentation==1.2.2
cd "$dir"
venv/bin/python -W ignore - <<'EOF'
import sys

import torch
from mmseg.models.losses import CrossEntropyLoss
from torch.nn.functional import cross_entropy

scores, labels = torch.zeros(1, 3, 4, 4), torch.zeros(1, 4, 4, dtype=torch.long)
weights = [1.0, 1.0, 100.0]
loss = CrossEntropyLoss(class_weight=weights)
labels[:, :2] = 255
try:
    loss(scores, labels, ignore_index=255)
    sys.exit('ignored labels are taken now')
except IndexError as error:
    print(f'ignore_index 255: IndexError: {error}')
labels[:, :2] = -1
seen = loss(scores, labels, ignore_index=-1).item()
right = cross_entropy(scores, labels, torch.tensor(weights), ignore_index=-1).item()
print(f'ignore_index -1: {seen:.2f}')
sys.exit(not (round(seen, 2) == 0.01 and round(right, 2) == 1.1))
EOF
