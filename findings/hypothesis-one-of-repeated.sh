#!/bin/sh
# hypothesis 6.170.17, Python 3.11, x86-64
#
# An alternative that is given to one_of several times, to be drawn more often, is drawn as often as if it were there
# once: one_of leaves out strategies that are the same object, to end the unrolling of recursive ones, and calls such as
# integers(0, 9) with equal arguments return the same object from a cache. Strategies that are made anew by each call,
# as by map, do count, and so do repeated values of sampled_from. A test that means to draw few large cases draws many.
#
# Seen, how often a small number is drawn:
#   one_of(small, large): 0.50
#   one_of(small, small, small, large): 0.50
#   one_of(mapped, mapped, mapped, large), each by a map of its own: 0.73
#   small and large by sampled_from([0, 0, 0, 1]): 0.73
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 130' INT TERM
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile hypothesis==6.170.17
"$dir/venv/bin/python" - <<'EOF'
import sys

from hypothesis import given, settings
from hypothesis import strategies as st


def small():
    return st.integers(0, 10**6 - 1)


def mapped():
    return small().map(int)


def share(strategy):
    """Return how often a number below a million is drawn."""
    drawn = []

    @settings(max_examples=2000, database=None, derandomize=True, deadline=None)
    @given(strategy)
    def draw(number):
        drawn.append(number < 10**6)

    draw()
    return sum(drawn) / len(drawn)


large = st.integers(10**6, 10**7)
cases = {
    'one_of(small, large)': st.one_of(small(), large),
    'one_of(small, small, small, large)': st.one_of(small(), small(), small(), large),
    'one_of(mapped, mapped, mapped, large), each by a map of its own': st.one_of(mapped(), mapped(), mapped(), large),
    'small and large by sampled_from([0, 0, 0, 1])': st.sampled_from([0, 0, 0, 1]).flatmap([small(), large].__getitem__),
}
found = [share(strategy) for strategy in cases.values()]
for name, value in zip(cases, found):
    print(f'{name}: {value:.2f}')
sys.exit(not (abs(found[1] - found[0]) < 0.05 and min(found[2:]) > found[1] + 0.1))
EOF
