#!/bin/sh
# pycocotools 2.0.11, numpy 2.4.6, Python 3.11, x86-64
#
# COCOeval notes the id of the annotation that a detection matched, and 0 where none did. An annotation whose id is 0
# therefore never counts as found: its detection is a false positive, and itself a miss. Files numbered from 0, as many
# converters write them, lose one object: perfect predictions score below 1, and 0 where it is the only object. The
# format does not say where ids start; no warning is given.
#
# Seen, perfect predictions for one object in each of three images:
#   ids 1, 2, 3: AP 1.000
#   ids 0, 1, 2: AP 0.442
#   one image with id 0: AP 0.000
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


def precision(ids):
    """Return the AP of perfect predictions for one object an image, whose annotations have these ids."""
    box = dict(category_id=1, bbox=[10, 10, 30, 30])
    images = [dict(id=number, width=100, height=100, file_name=f'{number}.png') for number in range(len(ids))]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = dict(images=images, categories=[dict(id=1, name='disc')], annotations=[
            dict(box, id=key, image_id=number, area=900, iscrowd=0) for number, key in enumerate(ids)])
        truth.createIndex()
        found = truth.loadRes([dict(box, image_id=number, score=0.9) for number in range(len(ids))])
        evaluation = COCOeval(truth, found, 'bbox')
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return round(evaluation.stats[0], 3)


values = precision([1, 2, 3]), precision([0, 1, 2]), precision([0])
print('ids 1, 2, 3: AP {:.3f}\nids 0, 1, 2: AP {:.3f}\none image with id 0: AP {:.3f}'.format(*values))
sys.exit(values != (1.0, 0.442, 0.0))
EOF
