#!/bin/sh
# sentryward 0.1.1, torch 2.13.0, Python 3.11, x86-64
#
# sentryward, a verifier of PTX kernels, compares a kernel with a PyTorch function in a file of one's own. The file is run
# as a module named "example_reference" that is not put into sys.modules, and then exported by torch.export in strict mode,
# which imports the module of each global name that the function uses. So a file that begins with "import torch", as any
# engineer writes it, ends in "unsupported": "PyTorch capture failed: No module named 'example_reference'", which names no
# file of the user's. The same function with the import inside it is verified; constants have to be written inside, too.
#
# Seen:
#   import at the top of the file: unsupported (PyTorch capture failed: No module named 'example_reference')
#   import inside the function: verified
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 130' INT TERM
python3 -m venv "$dir/venv"
python="$dir/venv/bin/python"
"$python" -m pip install --quiet --no-compile torch==2.13.0 numpy==2.4.6 sentryward==0.1.1
cat > "$dir/kernel.ptx" <<'EOF'
.version 8.6
.target sm_100
.address_size 64
.visible .entry twice(.param .u64 twice_x, .param .u64 twice_y)
{
    .reg .b32 %r<2>;
    .reg .f32 %f<3>;
    .reg .b64 %rd<8>;
    ld.param.u64 %rd1, [twice_x];
    ld.param.u64 %rd2, [twice_y];
    cvta.to.global.u64 %rd3, %rd1;
    cvta.to.global.u64 %rd4, %rd2;
    mov.u32 %r1, %tid.x;
    mul.wide.u32 %rd5, %r1, 4;
    add.s64 %rd6, %rd3, %rd5;
    add.s64 %rd7, %rd4, %rd5;
    ld.global.f32 %f1, [%rd6];
    add.f32 %f2, %f1, %f1;
    st.global.f32 [%rd7], %f2;
    ret;
}
EOF
cat > "$dir/check.py" <<'EOF'
import json
import sys
from pathlib import Path

import sentryward

folder = Path(sys.argv[1])
x, y = '6:global1:x', '6:global1:y'
launch = dict(grid_dim=[1, 1, 1], block_dim=[32, 1, 1])
pointers = [dict(parameter=i, type='pointer', space='global', object=name) for i, name in enumerate('xy')]
layout = dict(source_offset=0, target_offset=0, element_bytes=4, shape=[32])
layout.update(source_strides_bytes=[4], target_strides_bytes=[4])
side = dict(allocations={x: 'x'}, parameters={}, layouts={x: layout})
output = dict(kind='dense_tensor', left_allocation=y, right_allocation=y, left_offset=0, right_offset=0)
output.update(element_bytes=4, shape=[32], left_strides_bytes=[4], right_strides_bytes=[4])
binding = dict(
    schema='spverify.equivalence-mapping.v1',
    left_inputs=side,
    right_inputs=side,
    output_value_semantics='ideal_real',
    outputs=output,
    reference=dict(arguments=[dict(name='x', allocation=x, dtype='float32')]),
)
(folder / 'input.json').write_text(
    json.dumps(dict(schema='spverify.kernel-input/v1', launch=launch, declarations=pointers))
)
(folder / 'reference_binding.json').write_text(json.dumps(binding))
sources = {
    'import at the top of the file': 'import torch\n\ndef reference(x):\n    return torch.add(x, x)\n',
    'import inside the function': 'def reference(x):\n    import torch\n    return torch.add(x, x)\n',
}
results = []
for name, source in sources.items():
    (folder / 'reference.py').write_text(source)
    said = sentryward.verify(
        folder / 'kernel.ptx', input=folder / 'input.json', reference=folder / 'reference.py', timeout_seconds=300
    )
    reasons = ''.join(f' ({diagnostic["message"]})' for diagnostic in said['diagnostics'])
    print(f'{name}: {said["result"]}{reasons}')
    results.append(said['result'])
sys.exit(results != ['unsupported', 'verified'])
EOF
"$python" "$dir/check.py" "$dir"
