#!/bin/sh
# mmengine 0.10.7, torch 2.13.0 (CPU), numpy 2.4.6, Python 3.11, x86-64
#
# Where several processes share the images of a run, each with a Visualizer of its own, only the first one draws. In all
# others every method, set_image, draw_bboxes and even get_image, returns None and does nothing, without an error or a
# warning: they are wrapped by master_only. Two thirds of the drawings of three processes are missing. A method's
# __wrapped__ attribute is the one that draws.
#
# Seen, in a group of two processes:
#   process 0: get_image() returns ndarray
#   process 1: get_image() returns NoneType, through __wrapped__ ndarray
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 130' INT TERM
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile numpy==2.4.6 torch==2.13.0 mmengine==0.10.7 'setuptools<81'
cat > "$dir/draw.py" <<'EOF'
import sys

import numpy as np
import torch
from mmengine.visualization import Visualizer

rank, store = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group('gloo', init_method=f'file://{store}', rank=rank, world_size=2)
visualizer = Visualizer()
image = np.zeros((20, 20, 3), np.uint8)
visualizer.set_image(image)
visualizer.draw_bboxes(torch.tensor([[2, 2, 15, 15]]), edge_colors='w')
drawn = visualizer.get_image()
if rank == 0:
    print(f'process 0: get_image() returns {type(drawn).__name__}', flush=True)
    expected = isinstance(drawn, np.ndarray) and drawn.any()
else:
    Visualizer.set_image.__wrapped__(visualizer, image)
    within = Visualizer.get_image.__wrapped__(visualizer)
    print(f'process 1: get_image() returns {type(drawn).__name__}, through __wrapped__ {type(within).__name__}', flush=True)
    expected = drawn is None and isinstance(within, np.ndarray)
sys.exit(not expected)
EOF
"$dir/venv/bin/python" -W ignore "$dir/draw.py" 1 "$dir/store" &
"$dir/venv/bin/python" -W ignore "$dir/draw.py" 0 "$dir/store"
wait $!
