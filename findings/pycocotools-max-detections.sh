#!/bin/sh
# pycocotools 2.0.11, numpy 2.4.6, Python 3.11, x86-64
#
# COCOeval.summarize takes the first figure, AP at IoU 0.50:0.95, at 100 detections an image, a number that is written
# into the code; the other figures use the last entry of params.maxDets. With maxDets = [1, 10, 500], as for crowded
# images, AP is -1 ("no ground truth") while AP50 and AP75 right below are correct. No warning is given.
#
# Seen, perfect predictions:
#   maxDets [1, 10, 100]: AP 1.0, AP50 1.0, AP75 1.0
#   maxDets [1, 10, 500]: AP -1.0, AP50 1.0, AP75 1.0
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 130' INT TERM
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile numpy==2.4.6 pycocotools==2.0.11
"$dir/venv/bin/python" - <<'EOF'
import contextlib
import io
import sys

from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval


def figures(most):
    """Return AP, AP50 and AP75 of a perfect prediction with these maxDets."""
    box = dict(image_id=1, category_id=1, bbox=[10, 10, 30, 30])
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = dict(
            images=[dict(id=1, width=100, height=100, file_name='1.png')],
            categories=[dict(id=1, name='disc')],
            annotations=[dict(box, id=1, area=900, iscrowd=0)])
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes([dict(box, score=0.9)]), 'bbox')
        evaluation.params.maxDets = most
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [round(float(value), 3) for value in evaluation.stats[:3]]


for most, expected in ([1, 10, 100], [1.0, 1.0, 1.0]), ([1, 10, 500], [-1.0, 1.0, 1.0]):
    values = figures(most)
    print('maxDets {}: AP {}, AP50 {}, AP75 {}'.format(most, *values))
    if values != expected:
        sys.exit(1)
EOF
