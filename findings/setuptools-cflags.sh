#!/bin/sh
# setuptools 80.9.0 and 70.0.0, Python 3.11 (configured with -O3 for extensions), Linux, x86-64
#
# With CFLAGS in the environment, setuptools 70 adds it to the flags that Python was configured with; setuptools 80 puts
# it in their place. Any CFLAGS, a -I or a -Wno-..., thereby takes -O3, -DNDEBUG and -fwrapv away: C and C++ extensions
# (mmcv's and pycocotools' among them) are compiled without optimisation, many times slower, and nothing says so.
# (79.0.1, 78.1.1 and 84.2.1 do as 80.9.0.)
#
# Seen, "setup.py build_ext" of one C file (the optimisation flags in the compiler's command):
#   setuptools 70.0.0: without CFLAGS -O3, with CFLAGS=-DPROBE -O3
#   setuptools 80.9.0: without CFLAGS -O3, with CFLAGS=-DPROBE none
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 130' INT TERM
cd "$dir"
python3 -m venv venv
cat > setup.py <<'EOF'
from setuptools import Extension, setup
setup(name='probe', version='1', ext_modules=[Extension('probe', ['probe.c'])])
EOF
echo 'int probe(void) { return 0; }' > probe.c
unset CFLAGS

optimisation() {
    rm -rf build probe.*.so
    "$@" venv/bin/python setup.py build_ext --inplace 2>/dev/null | grep -e '-c probe.c' |
        grep -o -e ' -O[0-9sgf]*' || echo ' none'
}

check() {
    venv/bin/pip install --quiet --no-compile "setuptools==$1"
    without=$(optimisation env)
    with=$(optimisation env CFLAGS=-DPROBE)
    echo "setuptools $1: without CFLAGS$without, with CFLAGS=-DPROBE$with"
    test "$without" = ' -O3' && test "$with" = "$2"
}

check 70.0.0 ' -O3'
check 80.9.0 ' none'
