#!/bin/sh
# openmim 0.3.9, mmdet 3.3.0, mmengine-lite 0.10.7, Python 3.11
#
# "mim download" fetches a config and its weights. For a config whose metafile names no weights, which the format allows
# and three of mmdet's own have, it fails before it looks at the config, on the missing value that the table of all
# models holds there; "mim search" shows the same entry without a word.
#
# Seen, DINO with 24 epochs, for which mmdet publishes no weights:
#   AttributeError: 'float' object has no attribute 'split'
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 130' INT TERM
cd "$dir"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile openmim==0.3.9
venv/bin/pip install --quiet --no-compile mmengine-lite==0.10.7 opencv-python-headless==5.0.0.93
venv/bin/pip install --quiet --no-compile --no-deps mmdet==3.3.0
PATH="$dir/venv/bin:$PATH"
mim download mmdet --config dino-4scale_r50_8xb2-24e_coco --dest files > log 2>&1 && exit 1
tail -n 1 log
grep -q "^AttributeError: 'float' object has no attribute 'split'" log
test -z "$(ls files)"
