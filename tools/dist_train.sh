#!/usr/bin/env bash
# Train with several processes: tools/dist_train.sh CONFIG PROCESSES_PER_NODE [arguments of train.py]
# Several nodes: set NNODES, NODE_RANK, MASTER_ADDR and PORT on each.
set -euo pipefail

if [ $# -lt 2 ]; then
    echo "usage: $0 CONFIG PROCESSES_PER_NODE [arguments of train.py]" >&2
    exit 2
fi
config=$1
processes=$2
tools=$(cd "$(dirname "$0")" && pwd)

export PYTHONPATH="$tools/..${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python}" -m torch.distributed.run \
    --nnodes="${NNODES:-1}" \
    --node_rank="${NODE_RANK:-0}" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" \
    --master_port="${PORT:-29500}" \
    --nproc_per_node="$processes" \
    "$tools/train.py" "$config" --launcher pytorch "${@:3}"
