#!/bin/sh
# mmsegmentation 1.2.2, mmcv 2.1.0, mmengine 0.10.7, pillow 13.0.0, torch 2.13.0 (CPU), numpy 2.4.6, Python 3.11, x86-64
# Compiling mmcv takes about 20 minutes of a core the first time; pip keeps the result.
#
# LoadAnnotations casts label maps to 8 bits. A map of 16 bits, the usual form for more than 255 classes, is read
# without complaint and its labels are taken modulo 256: 300 becomes 44, another class, 256 becomes 0, and 511 becomes
# 255, which is ignored. Both image backends do so.
#
# Seen, a PNG of 16 bits:
#   file   [0, 1, 255, 256, 300, 511]
#   pillow [0, 1, 255, 0, 44, 255]
#   cv2    [0, 1, 255, 0, 44, 255]
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 130' INT TERM
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile numpy==2.4.6 torch==2.13.0 setuptools==80.9.0 wheel==0.45.1 \
    packaging==26.3 ninja==1.13.2 psutil==7.2.2
"$dir/venv/bin/pip" install --quiet --no-compile --no-build-isolation mmengine==0.10.7 mmcv==2.1.0
"$dir/venv/bin/pip" install --quiet --no-compile pillow==13.0.0
"$dir/venv/bin/pip" install --quiet --no-compile prettytable==3.18.0 scipy==1.17.1 ftfy==6.3.1 regex==2026.11.15
"$dir/venv/bin/pip" install --quiet --no-compile --no-deps mmsegmentation==1.2.2
cd "$dir"
venv/bin/python -W ignore - <<'EOF'
import sys

import numpy as np
from mmseg.datasets.transforms import LoadAnnotations
from PIL import Image

labels = [0, 1, 255, 256, 300, 511]
Image.fromarray(np.array([labels], np.uint16)).save('labels.png')
print(f'file   {labels}')
for backend in 'pillow', 'cv2':
    results = dict(seg_map_path='labels.png', reduce_zero_label=False, seg_fields=[])
    seen = LoadAnnotations(imdecode_backend=backend)(results)['gt_seg_map'].ravel().tolist()
    print(f'{backend:6} {seen}')
    if seen != [0, 1, 255, 0, 44, 255]:
        sys.exit(1)
EOF
