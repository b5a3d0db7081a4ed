#!/bin/sh
# torch 2.13.0 (CPU), numpy 2.4.6, Python 3.11, x86-64
#
# A model that keeps its maps as contiguous (B, H, W, C) and hands a permuted view to its convolutions copies nothing
# when it runs eagerly. torch.compile on a CPU takes every tensor of four dimensions before the last convolution for
# (B, C, H, W) and gives it "channels last" strides: of (B, H, W, C) the rows become the innermost dimension. What a matrix
# product or a custom operator reads is stored that way, and copied back element by element, which can make the compiled
# model slower than the eager one. options={'layout_optimization': False} of torch.compile avoids it.
#
# Seen, for maps (2, 5, 6, 32), whose strides are (960, 192, 32, 1):
#   layout_optimization True: buffers with rows innermost: 1
#   layout_optimization False: buffers with rows innermost: 0
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 130' INT TERM
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile numpy==2.4.6 torch==2.13.0
"$dir/venv/bin/python" - <<'EOF'
import sys

import torch
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code
from torch.nn import functional as F


@torch.library.custom_op('findings::twice', mutates_args=())
def twice(x: Tensor) -> Tensor:
    return 2 * x


@twice.register_fake
def _(x):
    return torch.empty_like(x)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv2d(32, 32, 3, padding=1) for _ in range(2))
        self.projections = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))

    def forward(self, x):
        for convolution, projection in zip(self.convolutions, self.projections, strict=True):
            x = F.silu(convolution(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
            assert x.is_contiguous()
            x = twice(x) + projection(x)
        return x


found = {}
for optimization in (True, False):
    torch._dynamo.reset()
    compiled = torch.compile(Block().eval(), options={'layout_optimization': optimization})
    with torch.no_grad():
        _, code = run_and_get_code(compiled, torch.randn(2, 5, 6, 32))
    found[optimization] = '\n'.join(code).count('empty_strided_cpu((2, 5, 6, 32), (960, 1, 160, 5)')
    print(f'layout_optimization {optimization}: buffers with rows innermost: {found[optimization]}')
sys.exit(not found[True] or found[False])
EOF
