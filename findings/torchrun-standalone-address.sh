#!/bin/sh
# torch 2.13.0, Python 3.11, Linux
#
# torch.distributed.run --standalone starts the processes of one machine, which meet at localhost by its help. But what
# it tells them as MASTER_ADDR is the host's own full name. Where that name does not resolve, as in some containers and
# networks, they do not find each other. With --local-addr 127.0.0.1 it tells them that address.
#
# Seen:
#   --standalone: the host's full name
#   --standalone --local-addr 127.0.0.1: 127.0.0.1
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 130' INT TERM
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile torch==2.13.0 numpy==2.4.6
cat > "$dir/worker.py" <<'EOF'
import os
import socket

address = os.environ['MASTER_ADDR']
print("the host's full name" if address == socket.getfqdn(socket.gethostname()) else address)
EOF
run() {
    OMP_NUM_THREADS=1 "$dir/venv/bin/python" -m torch.distributed.run --standalone "$@" "$dir/worker.py" 2> "$dir/log" ||
        { cat "$dir/log" >&2; exit 1; }
}
plain=$(run)
named=$(run --local-addr 127.0.0.1)
echo "--standalone: $plain"
echo "--standalone --local-addr 127.0.0.1: $named"
[ "$plain" = "the host's full name" ] && [ "$named" = 127.0.0.1 ]
