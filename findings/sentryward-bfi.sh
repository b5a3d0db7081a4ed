#!/bin/sh
# sentryward 0.1.1, Python 3.11, x86-64
#
# sentryward, a verifier of PTX kernels, does not evaluate bfi.b32, which nvcc emits for (a & m) << p | b on sm_90 (and
# not on sm_100, for which the verifier was made). No message names the instruction: an address that one goes into might
# be any address, and a branch "is not statically determined", as if they came from data. With the and, shl and or that
# it stands for, the same kernel is race_free.
#
# Seen:
#   bfi: unsupported (symbolic offsets in absolute shared address may overlap under the address invariants; candidate
#     valuation {opaque:["canonical_value_dag",1,1,8]=0, opaque:["canonical_value_dag",1,1,13]=0})
#   and, shl, or: race_free
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 130' INT TERM
python3 -m venv "$dir/venv"
python="$dir/venv/bin/python"
"$python" -m pip install --quiet --no-compile sentryward==0.1.1
cat > "$dir/check.py" <<'EOF'
import json
import sys
from pathlib import Path

import sentryward

# Each of 32 threads stores to a float of its own in shared memory.
KERNEL = """
.version 8.6
.target sm_100
.address_size 64
.extern .shared .align 16 .b8 memory[];
.visible .entry own()
{
    .reg .b32 %r<9>;
    mov.u32 %r1, %tid.x;
    shr.u32 %r2, %r1, 4;
    INDEX
    shl.b32 %r5, %r4, 2;
    mov.u32 %r6, memory;
    add.s32 %r7, %r6, %r5;
    st.shared.u32 [%r7], %r1;
    ret;
}
"""
INDICES = {
    'bfi': 'bfi.b32 %r4, %r1, %r2, 1, 4;',
    'and, shl, or': 'and.b32 %r3, %r1, 15; shl.b32 %r3, %r3, 1; or.b32 %r4, %r3, %r2;',
}
folder = Path(sys.argv[1])
launch = dict(grid_dim=[1, 1, 1], block_dim=[32, 1, 1], dynamic_shared_bytes=128)
(folder / 'input.json').write_text(json.dumps(dict(schema='spverify.kernel-input/v1', launch=launch)))
results = []
for name, index in INDICES.items():
    (folder / 'kernel.ptx').write_text(KERNEL.replace('INDEX', index))
    said = sentryward.verify(folder / 'kernel.ptx', input=folder / 'input.json', timeout_seconds=300)
    reasons = ''.join(f' ({diagnostic["message"]})' for diagnostic in said['diagnostics'])
    print(f'{name}: {said["result"]}{reasons}')
    results.append(said['result'])
sys.exit(results[0] == 'race_free' or results[1] != 'race_free')
EOF
"$python" "$dir/check.py" "$dir"
