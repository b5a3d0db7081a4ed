#!/bin/sh
# mmdet 3.3.0, mmcv 2.1.0, mmengine 0.10.7, pycocotools 2.0.11, torch 2.13.0 (CPU), numpy 2.4.6, Python 3.11, x86-64
# Compiling mmcv takes about 20 minutes of a core the first time; pip keeps the result.
#
# CocoDataset numbers labels in the order of the file's categories, not of metainfo's classes. Classes that are listed
# in another order get each other's names, in predictions, pictures and figures by class; nothing is said, and the loss
# falls as it should. A class whose name differs by a letter's case does not exist: its objects vanish, the classes
# behind it move up by one, and dogs are labelled with the name that fits nothing. (pycocotools' getCatIds returns ids
# in the file's order and leaves unknown names out; CocoDataset numbers what comes back.)
#
# Seen, a file with a cat in 1.png and a dog in 2.png:
#   classes ('cat', 'dog'): 1.png cat, 2.png dog
#   classes ('dog', 'cat'): 1.png dog, 2.png cat
#   classes ('Cat', 'dog'): 1.png nothing, 2.png Cat
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
venv/bin/python -W ignore - <<'EOF'
import contextlib
import io
import json
import sys

from mmdet.datasets import CocoDataset

box = dict(bbox=[10, 10, 30, 30], area=900, iscrowd=0)
with open('annotations.json', 'w') as file:
    json.dump(dict(
        images=[dict(id=number, width=100, height=100, file_name=f'{number}.png') for number in (1, 2)],
        annotations=[dict(box, id=number, image_id=number, category_id=number) for number in (1, 2)],
        categories=[dict(id=1, name='cat'), dict(id=2, name='dog')]), file)

expected = {('cat', 'dog'): ['cat', 'dog'], ('dog', 'cat'): ['dog', 'cat'], ('Cat', 'dog'): ['nothing', 'Cat']}
for classes, names in expected.items():
    with contextlib.redirect_stdout(io.StringIO()):
        data = CocoDataset(ann_file='annotations.json', metainfo=dict(classes=classes), data_prefix=dict(img=''),
                           pipeline=[])
    seen = []
    for number in range(len(data)):
        labels = [instance['bbox_label'] for instance in data.get_data_info(number)['instances']]
        seen.append(data.metainfo['classes'][labels[0]] if labels else 'nothing')
    print('classes {}: 1.png {}, 2.png {}'.format(classes, *seen))
    if seen != names:
        sys.exit(1)
EOF
