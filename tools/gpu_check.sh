#!/bin/sh
# Builds the ops for the GPU at hand, tests them there, and measures: one command, for a machine with torch and nvcc.
# Usage: tools/gpu_check.sh [FOLDER]     (tables and logs go to FOLDER, gpu_check by default)
# Needs torch built for CUDA, mmengine, pytest and nvcc; takes the Python named in PYTHON, python3 by default.
set -u
out=${1:-gpu_check}
case $out in /*) ;; *) out=$PWD/$out ;; esac
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3}
mkdir -p "$out"
failed=0

step() {  # step SECONDS NAME COMMAND...: run a command for so long at most, its output in NAME.txt
  seconds=$1 name=$2
  shift 2
  echo "== $name: $*"
  timeout "$seconds" "$@" > "$out/$name.txt" 2>&1
  code=$?
  tail -n 15 "$out/$name.txt"
  [ $code -eq 0 ] || { echo "== $name failed with status $code"; failed=1; }
}

{ git log -1 --format='commit %H' 2>/dev/null; nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv
  nvcc --version | tail -n 2; "$python" -c 'import torch; print("torch", torch.__version__)'; } > "$out/versions.txt" 2>&1
cat "$out/versions.txt"

export FORCE_CUDA=1
step 150 build "$python" setup.py build_ext --inplace
unset FORCE_CUDA
step 15 report "$python" -m cuda_ops
step 200 tests "$python" -m pytest -q tests/gpu -k 'not sanitizer'
step 55 sanitizer "$python" -m pytest -q tests/gpu -k sanitizer
# Stops by itself in time to print its tables; the most telling sizes come first.
step 110 benchmark "$python" tools/benchmark.py --device cuda --only 'gpu/*' --repeats 5 --seconds 90 \
  --json "$out/benchmark.json"
echo "== tables and logs are in $out"
exit $failed
