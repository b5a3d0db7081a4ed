#!/bin/sh
# safetensors 0.8.0, numpy 2.4.6, pycocotools 2.0.11, Python 3.11, x86-64
#
# safetensors.numpy.save and save_file write an array's memory as it lies under the array's shape, whatever its strides.
# An array in Fortran order comes back with its values permuted: no error, no warning. Up to 0.7.0 the values were
# right; safetensors.torch refuses such a tensor ("You are trying to save a non contiguous tensor"). The docstring asks
# for "contiguous and dense" arrays, and numpy calls an array in Fortran order contiguous too. Masks from
# pycocotools.mask.decode are in Fortran order, so a set of masks stored this way is scrambled. np.ascontiguousarray
# before saving avoids it.
#
# Seen:
#   0.8.0: [[0, 1, 2], [3, 4, 5]] in Fortran order is read back as [[0, 3, 1], [4, 2, 5]]
#   0.8.0: a mask decoded by pycocotools is read back equal: False
#   0.7.0: [[0, 1, 2], [3, 4, 5]] in Fortran order is read back as [[0, 1, 2], [3, 4, 5]]
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 130' INT TERM
python3 -m venv "$dir/venv"
python="$dir/venv/bin/python"
"$python" -m pip install --quiet --no-compile numpy==2.4.6 pycocotools==2.0.11 safetensors==0.8.0
cat > "$dir/check.py" <<'EOF'
import sys

import numpy as np
import safetensors
from pycocotools import mask
from safetensors.numpy import load, save

version = safetensors.__version__
array = np.asfortranarray(np.arange(6).reshape(2, 3))
back = load(save({'array': array}))['array']
print(f'{version}: {array.tolist()} in Fortran order is read back as {back.tolist()}')
if version == '0.7.0':
    sys.exit(not np.array_equal(back, array))
pixels = np.zeros((4, 6), np.uint8)
pixels[1, 2:5] = 1
decoded = mask.decode(mask.encode(np.asfortranarray(pixels)))
equal = np.array_equal(load(save({'mask': decoded}))['mask'], decoded)
print(f'{version}: a mask decoded by pycocotools is read back equal: {equal}')
sys.exit(equal or back.tolist() != [[0, 3, 1], [4, 2, 5]])
EOF
"$python" "$dir/check.py"
"$python" -m pip install --quiet --no-compile safetensors==0.7.0
"$python" "$dir/check.py"
