#!/bin/sh
# torch 2.13.0 (CPU), numpy 2.4.6, Python 3.11, x86-64
#
# The context manager torch.serialization.safe_globals takes off what it lists when it ends, also what was there before
# it began. A class that torch.serialization.add_safe_globals allowed for good is refused once any other code has read a
# file within a safe_globals block that lists the same class; an outer block loses it to an inner one likewise. So two
# libraries in one process take each other's permission away. It fails on the safe side, and with a message that tells
# the user to allow the class that he did allow. Entries given as (object, 'name') are affected among themselves only,
# which is a way round it.
#
# Seen:
#   after add_safe_globals: read
#   within safe_globals, after an inner safe_globals: refused
#   after both: refused
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 130' INT TERM
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile numpy==2.4.6 torch==2.13.0
"$dir/venv/bin/python" - <<'EOF'
import argparse
import io
import pickle
import sys

import torch
from torch.serialization import add_safe_globals, safe_globals

file = io.BytesIO()
torch.save({'settings': argparse.Namespace(lr=0.1)}, file)


def read():
    file.seek(0)
    try:
        torch.load(file, weights_only=True)
    except pickle.UnpicklingError:
        return 'refused'
    return 'read'


add_safe_globals([argparse.Namespace])
seen = [read()]
with safe_globals([argparse.Namespace]):
    with safe_globals([argparse.Namespace]):
        pass
    seen.append(read())
seen.append(read())
print('after add_safe_globals: {}\nwithin safe_globals, after an inner safe_globals: {}\nafter both: {}'.format(*seen))
sys.exit(seen != ['read', 'refused', 'refused'])
EOF
