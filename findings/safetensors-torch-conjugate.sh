#!/bin/sh
# safetensors 0.8.0, torch 2.13.0 (CPU), numpy 2.4.6, Python 3.11, x86-64
#
# torch makes the conjugate of a complex tensor lazily: .conj() and .mH set a bit on a view of the same memory.
# safetensors.torch.save writes the memory and forgets the bit, so the file holds the tensor before conjugation: no
# error, no warning. torch.save keeps it. Tensor.resolve_conj before saving avoids it. (The negative bit, of .imag of a
# conjugate, is never met: such a view has strides of 2, which are refused.)
#
# Seen:
#   saved [(1-2j), (3+4j)], read back [(1+2j), (3-4j)]
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 130' INT TERM
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile numpy==2.4.6 torch==2.13.0 safetensors==0.8.0
"$dir/venv/bin/python" - <<'EOF'
import sys

import torch
from safetensors.torch import load, save

tensor = torch.tensor([1 + 2j, 3 - 4j]).conj()
back = load(save({'tensor': tensor}))['tensor']
print(f'saved {tensor.tolist()}, read back {back.tolist()}')
sys.exit(not torch.equal(back, tensor.conj()))
EOF
