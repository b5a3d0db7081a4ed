#!/bin/sh
# executorch 1.5.1, torch 2.13.0 (CPU), numpy 2.4.6, Python 3.11, x86-64 Linux
#
# XNNPACK's partitioner takes a model in which two calls share an nn.Conv1d, and its lowering then fails: the first call
# gives the weight a fourth dimension, and the second finds it with four beside an input of three. The error names a
# pass, not the layer. A Conv1d that is called once is lowered, and so is a Conv2d that is called twice.
#
# Seen:
#   Conv1d called once: lowered
#   Conv1d called twice: Expected 4-dimensional input for 4-dimensional weight [4, 4, 3, 1]
#   Conv2d called twice: lowered
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 130' INT TERM
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile torch==2.13.0 executorch==1.5.1 numpy==2.4.6
cat > "$dir/shared.py" <<'EOF'
import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import to_edge_transform_and_lower


class Repeated(torch.nn.Module):
    def __init__(self, layer, calls):
        super().__init__()
        self.layer, self.calls = layer, calls

    def forward(self, x):
        for _ in range(self.calls):
            x = self.layer(x)
        return x


one, two = torch.nn.Conv1d(4, 4, 3, padding=1), torch.nn.Conv2d(4, 4, 3, padding=1)
line, image = torch.randn(1, 4, 8), torch.randn(1, 4, 8, 8)
for words, layer, calls, x in (
        ('Conv1d called once', one, 1, line),
        ('Conv1d called twice', one, 2, line),
        ('Conv2d called twice', two, 2, image)):
    program = torch.export.export(Repeated(layer, calls).eval(), (x,))
    try:
        to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch()
        seen = 'lowered'
    except Exception as error:
        seen = str(error.__cause__).partition(', but')[0]
    print(f'seen: {words}: {seen}')
EOF
"$dir/venv/bin/python" -W ignore "$dir/shared.py" > "$dir/out" 2> "$dir/log" || { cat "$dir/log"; exit 1; }
grep '^seen: ' "$dir/out" | sed 's/^seen: //' | tee "$dir/seen"
cat > "$dir/expected" <<'EOF'
Conv1d called once: lowered
Conv1d called twice: Expected 4-dimensional input for 4-dimensional weight [4, 4, 3, 1]
Conv2d called twice: lowered
EOF
cmp -s "$dir/seen" "$dir/expected"
