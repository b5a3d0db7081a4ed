"""The kernels' threads are ordered in every schedule, by the word of a verifier: ``make prove``."""

import collections
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.cuda_emulation.emulate import ROOT, compiler
from tests.ptx import equivalence, interpret, prove

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec('sentryward') is None, reason='sentryward comes with `make prove`'),
    pytest.mark.skipif(compiler() is None or interpret.toolkit() is None, reason='needs g++ and nvcc'),
]

# What the verifier cannot decide, and why.
LIMITS = {
    'scan_forward_n1': 'allocation identity is unresolved',
}


@pytest.fixture(scope='module')
def table() -> Iterator[list[str]]:
    """Rows of build/proofs.md."""
    rows: list[str] = []
    yield rows
    head = ['| kernel | case | architecture | verdict | s |', '| --- | --- | --- | --- | ---: |']
    Path(ROOT, 'build', 'proofs.md').write_text('\n'.join([*head, *rows, '']))


@pytest.mark.parametrize('case', prove.CASES)
@pytest.mark.parametrize('arch', prove.ARCHS)
def test_no_schedule_has_a_race(arch: str, case: str, table: list[str]) -> None:
    for launch in prove.record(prove.CASES[case]):
        ptx, symbol = prove.kernels(arch)[launch.kernel]
        verdict = prove.verify(ptx, prove.configuration(launch, symbol))
        row = f'| `{launch.kernel}` | {case} | {arch} | {verdict} | {verdict.seconds:.0f} |'
        print(row)
        table.append(row)
        limit = LIMITS.get(launch.kernel.partition('<')[0])
        if limit:
            assert verdict.result == 'unsupported' and limit in verdict.reason
        else:
            assert verdict.result == 'race_free', row


# Not every barrier counts at these sizes: some order several warps, chunks or work items.
@pytest.mark.parametrize(
    'case', ('sequence of 40, N = 16', '12x12, N = 2', '9x9, N = 1', 'wavefront 9x9, N = 2, two strips and tiles')
)
def test_a_verdict_is_lost_with_a_barrier(case: str) -> None:
    for launch in prove.record(prove.CASES[case]):
        if launch.kernel.partition('<')[0] in LIMITS:
            continue
        ptx, symbol = prove.kernels('sm_90')[launch.kernel]
        given = prove.configuration(launch, symbol)
        results = collections.Counter(prove.verify(text, given).result for text in prove.without_barriers(ptx, symbol))
        print(launch.kernel, case, dict(results))
        assert results['potential_race'] + results['unsupported'] > 0


@pytest.mark.parametrize('states, length', ((2, 3), (2, 34), (16, 2)))
def test_real_numbers_would_follow_the_equations(states: int, length: int) -> None:
    with torch.no_grad():
        (launch,) = prove.record(lambda: prove.row(32, states, length))
    verdict = equivalence.prove_row(launch, 'sm_90')
    print(f'| `{launch.kernel}` | {states} states, length {length} | {verdict} | {verdict.seconds:.0f} |')
    assert verdict.result == 'verified'
