#!/bin/sh
# openmim 0.3.9 (which brings openxlab 0.1.3), pip 23.2.1, Python 3.11, Linux
#
# "pip install openmim", the first line of OpenMMLab's installation guides, replaces the environment's setuptools by
# 60.2.0: its dependency openxlab asks for setuptools~=60.2.0. That version does not know the [project] table of
# pyproject.toml. From then on "pip install --no-build-isolation", which packages with compiled operators need, installs
# a project that describes itself there as an empty package of the name UNKNOWN, version 0.0.0. pip reports success, and
# "setuptools>=77" in the project's requirements for building is not looked at without isolation. "pip install -U
# setuptools" afterwards mends it.
#
# Seen:
#   before openmim: setuptools 80.9.0, installed probe-pkg 1.2.3
#   after openmim: setuptools 60.2.0, installed UNKNOWN 0.0.0
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 130' INT TERM
cd "$dir"
mkdir -p project/probe_pkg
touch project/probe_pkg/__init__.py
cat > project/pyproject.toml <<'EOF'
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"
[project]
name = "probe-pkg"
version = "1.2.3"
EOF
python3 -m venv venv

installed() {
    rm -rf project/build project/*.egg-info
    venv/bin/pip install --quiet --no-build-isolation ./project
    venv/bin/pip list --format freeze | grep -i -E '^(probe|UNKNOWN)' | sed 's/==/ /'
    venv/bin/pip uninstall --quiet --yes probe-pkg UNKNOWN 2>/dev/null
}

version() {
    venv/bin/python -c 'import importlib.metadata as m; print(m.version("setuptools"))'
}

venv/bin/pip install --quiet --no-compile setuptools==80.9.0 wheel==0.45.1
before="$(version), installed $(installed)"
echo "before openmim: setuptools $before"
venv/bin/pip install --quiet --no-compile openmim==0.3.9
after="$(version), installed $(installed)"
echo "after openmim: setuptools $after"
test "$before" = '80.9.0, installed probe-pkg 1.2.3'
test "$after" = '60.2.0, installed UNKNOWN 0.0.0'
