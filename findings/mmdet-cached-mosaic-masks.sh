#!/bin/sh
# mmdet 3.3.0, mmcv 2.1.0, mmengine 0.10.7, torch 2.13.0 (CPU), numpy 2.4.6, Python 3.11, x86-64
# Compiling mmcv takes about 20 minutes of a core the first time; pip keeps the result.
#
# CachedMosaic, the mosaic of RTMDet-Ins, takes img_scale as (width, height), and gives its image twice that size. Its
# masks have height and width exchanged, so that they end at column 2 * height in a wide scale, and at row 2 * width in
# a tall one: masks of objects behind it are empty, beside boxes and labels that are right, and nothing is said. Square
# scales are right. And a cache of 4 images, the least that max_cached_images allows, never makes a mosaic: more than
# four have to be in it, and the fifth is thrown out before that is looked at. Take 5 or more.
#
# Seen, four images of 60x100 pixels, in each an object of 10x10:
#   scale (100, 100), cache 5: image (200, 200), masks (200, 200), pixels of each 100 100 100 100
#   scale (100, 60), cache 5: image (120, 200), masks (200, 120), pixels of each 100 0 100 0
#   scale (100, 100), cache 4: image (60, 100), masks (60, 100), pixels of each 100
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 130' INT TERM
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile numpy==2.4.6 torch==2.13.0 setuptools==80.9.0 wheel==0.45.1 \
    packaging==26.3 ninja==1.13.2 psutil==7.2.2
"$dir/venv/bin/pip" install --quiet --no-compile --no-build-isolation mmengine==0.10.7 mmcv==2.1.0
"$dir/venv/bin/pip" install --quiet --no-compile \
    pycocotools==2.0.11 shapely==2.2.0 scipy==1.17.1 terminaltables==3.1.10 six==1.17.0 tqdm==4.70.1
"$dir/venv/bin/pip" install --quiet --no-compile --no-deps mmdet==3.3.0
cd "$dir"
cat > mosaic.py <<'EOF'
import numpy as np
from mmdet.datasets.transforms import CachedMosaic
from mmdet.structures.bbox import HorizontalBoxes
from mmdet.structures.mask import BitmapMasks

HEIGHT, WIDTH = 60, 100
LEFT, TOP, RIGHT, BOTTOM = 85, 45, 95, 55


def sample():
    mask = np.zeros((1, HEIGHT, WIDTH), np.uint8)
    mask[0, TOP:BOTTOM, LEFT:RIGHT] = 1
    return dict(
        img=np.zeros((HEIGHT, WIDTH, 3), np.uint8),
        gt_bboxes=HorizontalBoxes(np.array([[LEFT, TOP, RIGHT, BOTTOM]], np.float32)),
        gt_bboxes_labels=np.zeros(1, np.int64),
        gt_ignore_flags=np.zeros(1, bool),
        gt_masks=BitmapMasks(mask, HEIGHT, WIDTH))


for scale, cache in (((100, 100), 5), ((100, 60), 5), ((100, 100), 4)):
    mosaic = CachedMosaic(img_scale=scale, center_ratio_range=(1.0, 1.0), max_cached_images=cache)
    for _ in range(20):
        result = mosaic(sample())
    masks = result['gt_masks'].masks
    assert len(masks) == len(result['gt_bboxes'])
    pixels = ' '.join(str(count) for count in masks.sum((1, 2)))
    image = result['img'].shape[:2]
    print(f'scale {scale}, cache {cache}: image {image}, masks {masks.shape[1:]}, pixels of each {pixels}')
EOF
venv/bin/python -W ignore mosaic.py 2>log | grep '^scale' > out || { cat log; exit 1; }
cat out
cat > expected <<'EOF'
scale (100, 100), cache 5: image (200, 200), masks (200, 200), pixels of each 100 100 100 100
scale (100, 60), cache 5: image (120, 200), masks (200, 120), pixels of each 100 0 100 0
scale (100, 100), cache 4: image (60, 100), masks (60, 100), pixels of each 100
EOF
cmp -s out expected
