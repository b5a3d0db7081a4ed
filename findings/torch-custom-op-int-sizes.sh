#!/bin/sh
# torch 2.13.0 (CPU), numpy 2.3.5, Python 3.11, x86-64
#
# An operator of one's own whose schema says `int` accepts a size under torch.compile(dynamic=True) without a warning, and
# makes the program serve that size alone: each further size compiles another program. With `SymInt` in the schema, and
# the same kernel, one program serves all sizes.
#
# Seen, for five sizes:
#   int 5 programs for 5 sizes
#   SymInt 1 programs for 5 sizes
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.3.5
cat > "$folder/try.py" <<'PY'
import warnings

import torch
from torch._dynamo.testing import CompileCounterWithBackend

library = torch.library.Library('sizes', 'DEF')
for kind in ('int', 'SymInt'):
    name = f'halved_by_{kind.lower()}'
    library.define(f'{name}(Tensor x, {kind} rows) -> Tensor')
    library.impl(name, lambda x, rows: x[:rows] / 2, 'CPU')
    torch.library.register_fake(f'sizes::{name}', lambda x, rows: x.new_empty(rows, x.shape[1]), lib=library)


def programs(operator):
    torch.compiler.reset()
    counter = CompileCounterWithBackend('aot_eager')
    compiled = torch.compile(lambda x: operator(x, x.shape[0] - 1), dynamic=True, fullgraph=True, backend=counter)
    for rows in range(4, 9):
        x = torch.randn(rows, 3)
        torch.testing.assert_close(compiled(x), x[:-1] / 2)
    return counter.frame_count


with warnings.catch_warnings():
    warnings.simplefilter('error')
    found = {'int': programs(torch.ops.sizes.halved_by_int), 'SymInt': programs(torch.ops.sizes.halved_by_symint)}
for kind, count in found.items():
    print(kind, count, 'programs for 5 sizes')
assert torch.__version__.startswith('2.13.0') and found == {'int': 5, 'SymInt': 1}, (torch.__version__, found)
PY
"$folder/env/bin/python" "$folder/try.py"
