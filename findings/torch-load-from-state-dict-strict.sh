#!/bin/sh
# torch 2.13.0 (CPU), numpy 2.4.6, Python 3.11, x86-64
#
# Modules that convert old checkpoints override _load_from_state_dict(state_dict, prefix, local_metadata, strict, ...).
# Its argument strict is always True: load_state_dict(strict=False) does not hand its own value on. A module that
# raises, or converts, "if strict" therefore does so in every load, and one cannot find out there whether the caller
# wants to go on without a tensor. Names appended to missing_keys or unexpected_keys follow the caller's value;
# messages appended to error_msgs are raised whatever it is.
#
# Seen:
#   load_state_dict(strict=True): the module gets strict=True
#   load_state_dict(strict=False): the module gets strict=True
#   strict=False, a name added to missing_keys: loaded
#   strict=False, a message added to error_msgs: RuntimeError
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 130' INT TERM
cat > "$dir/probe.py" <<'EOF'
import sys

from torch import nn


class Probe(nn.Module):
    def __init__(self, place=None):
        super().__init__()
        self.place, self.got = place, None

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        self.got = strict
        if self.place:
            dict(missing=missing_keys, error=error_msgs)[self.place].append('a tensor of an old format')


def outcome(place):
    try:
        Probe(place).load_state_dict({}, strict=False)
    except RuntimeError:
        return 'RuntimeError'
    return 'loaded'


seen = []
for strict in (True, False):
    probe = Probe()
    probe.load_state_dict({}, strict=strict)
    seen.append(probe.got)
    print(f'load_state_dict(strict={strict}): the module gets strict={probe.got}')
for place, name in (('missing', 'a name added to missing_keys'), ('error', 'a message added to error_msgs')):
    seen.append(outcome(place))
    print(f'strict=False, {name}: {seen[-1]}')
sys.exit(seen != [True, True, 'loaded', 'RuntimeError'])
EOF
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile numpy==2.4.6 torch==2.13.0
"$dir/venv/bin/python" "$dir/probe.py"
