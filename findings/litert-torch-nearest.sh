#!/bin/sh
# litert-torch 0.10.0 (litert-converter 0.5.0, ai-edge-litert 2.3.0), torch 2.13.0, Python 3.11, Linux
#
# LiteRT's converter computes torch.nn.functional.interpolate(mode='nearest') with the centres of pixels, as PyTorch's
# 'nearest-exact' does. At whole factors the two are the same. At others, as in the feature pyramid of an image whose
# sides are no multiples of 32, values come from other pixels, without an error.
#
# Seen:
#   2 to 4: torch 0 0 1 1, nearest-exact 0 0 1 1, litert 0 0 1 1
#   4 to 7: torch 0 0 1 1 2 2 3, nearest-exact 0 0 1 2 2 3 3, litert 0 0 1 2 2 3 3
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 130' INT TERM
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile torch==2.13.0 litert-torch==0.10.0 litert-converter==0.5.0 \
    ai-edge-litert==2.3.0 numpy==2.4.6
cat > "$dir/nearest.py" <<'EOF2'
import litert_torch
import torch


class Resize(torch.nn.Module):
    def __init__(self, width, mode):
        super().__init__()
        self.width, self.mode = width, mode

    def forward(self, x):
        return torch.nn.functional.interpolate(x, size=(1, self.width), mode=self.mode)


def words(values):
    return ' '.join(str(int(value)) for value in values.flatten())


for width, wider in ((2, 4), (4, 7)):
    x = torch.arange(float(width)).view(1, 1, 1, width)
    nearest = Resize(wider, 'nearest').eval()
    found = litert_torch.convert(nearest, (x,))(x)
    exact = Resize(wider, 'nearest-exact')(x)
    print(f'{width} to {wider}: torch {words(nearest(x))}, nearest-exact {words(exact)}, litert {words(found)}')
EOF2
"$dir/venv/bin/python" "$dir/nearest.py" > "$dir/out" 2> "$dir/log" || { cat "$dir/log"; exit 1; }
grep '^[0-9] to ' "$dir/out"
cat > "$dir/expected" <<'EOF2'
2 to 4: torch 0 0 1 1, nearest-exact 0 0 1 1, litert 0 0 1 1
4 to 7: torch 0 0 1 1 2 2 3, nearest-exact 0 0 1 2 2 3 3, litert 0 0 1 2 2 3 3
EOF2
grep '^[0-9] to ' "$dir/out" | cmp -s - "$dir/expected"
