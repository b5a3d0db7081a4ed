#!/bin/sh
# mmsegmentation 1.2.2, mmcv 2.1.0, mmengine 0.10.7, torch 2.13.0 (CPU), numpy 2.4.6, Python 3.11, x86-64
# Compiling mmcv takes about 20 minutes of a core the first time; pip keeps the result.
#
# DiceLoss takes ignore_index, 255 by default, and does not ignore pixels of that label: it leaves out the class, a
# channel of the scores, whose number is ignore_index, and with 255 there is none. An ignored pixel has no class in the
# targets, so that whatever the model says of it counts as wrong, and it is taught to be unsure there. The ignore_index
# that a head passes to the loss is not read at all. TverskyLoss with alpha and beta of 0.5 is the same of each class, and
# ignores them.
#
# Seen, for a model that is right about every labelled pixel, and of whose map half is ignored:
#   the labelled half alone: 0.00
#   with the ignored half: 0.33
#   with it, TverskyLoss: 0.00
#   largest gradient of an ignored pixel of an unsure model, relative to that of a labelled one: 0.44
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
from mmseg.models.losses import DiceLoss, TverskyLoss
from torch.nn.functional import one_hot

labels = torch.zeros(1, 4, 4, dtype=torch.long)
labels[:, :, 2:] = 1
sure = 40.0 * one_hot(labels, 2).permute(0, 3, 1, 2).float()
half = DiceLoss(use_sigmoid=False)(sure[:, :, :2], labels[:, :2], ignore_index=255).item()
print(f'the labelled half alone: {half:.2f}')
labels[:, 2:] = 255
whole = DiceLoss(use_sigmoid=False)(sure, labels, ignore_index=255).item()
print(f'with the ignored half: {whole:.2f}')
tversky = TverskyLoss(alpha=0.5, beta=0.5)(sure, labels, ignore_index=255).item()
print(f'with it, TverskyLoss: {tversky:.2f}')

unsure = (sure / 40).requires_grad_()
DiceLoss(use_sigmoid=False)(unsure, labels, ignore_index=255).backward()
largest = unsure.grad.abs().amax((0, 1, 3))
ratio = (largest[2:].max() / largest[:2].max()).item()
print(f'largest gradient of an ignored pixel of an unsure model, relative to that of a labelled one: {ratio:.2f}')
sys.exit(not (round(half, 2) == round(tversky, 2) == 0 and round(whole, 2) == 0.33 and ratio > 0.1))
EOF
