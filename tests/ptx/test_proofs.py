"""The kernels' threads are ordered in every schedule, by the word of a verifier: ``make prove``."""

import collections
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.cuda_emulation.emulate import ROOT, compiler
from tests.ops.route_cases import Cross, Factors, Sequence
from tests.ops.wavefront_cases import Wavefront
from tests.ptx import equivalence, interpret, prove
from tests.ptx.prove import Call

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec('sentryward') is None, reason='sentryward comes with `make prove`'),
    pytest.mark.skipif(compiler() is None or interpret.toolkit() is None, reason='needs g++ and nvcc'),
]

# Kernels that the verifier cannot decide, and its reason.
LIMITS: dict[str, str] = {}


@pytest.fixture(scope='module')
def table() -> Iterator[list[str]]:
    """Rows of build/proofs.md."""
    rows: list[str] = []
    yield rows
    head = ['| kernel | call | architecture | verdict | s |', '| --- | --- | --- | --- | ---: |']
    Path(ROOT, 'build', 'proofs.md').write_text('\n'.join([*head, *rows, '']))


@pytest.mark.parametrize('call', prove.CALLS, ids=str)
@pytest.mark.parametrize('arch', prove.ARCHS)
def test_no_schedule_has_a_race(arch: str, call: Call, table: list[str]) -> None:
    for launch in call.launches():
        ptx, symbol = prove.kernels(arch)[launch.kernel]
        verdict = prove.verify(ptx, prove.configuration(launch, symbol))
        row = f'| `{launch.kernel}` | {call} | {arch} | {verdict} | {verdict.seconds:.0f} |'
        print(row)
        table.append(row)
        limit = LIMITS.get(launch.kernel.partition('<')[0])
        if limit:
            assert verdict.result == 'unsupported' and limit in verdict.reason, row
        else:
            assert verdict.result == 'race_free', row


def results_without_barriers(launch: prove.Launch) -> 'collections.Counter[str]':
    """What the verifier says with each of a kernel's barriers left out."""
    ptx, symbol = prove.kernels('sm_90')[launch.kernel]
    given = prove.configuration(launch, symbol)
    return collections.Counter(prove.verify(text, given).result for text in prove.without_barriers(ptx, symbol))


# Not every barrier counts at these sizes: some order several warps, chunks or work items. `scan_backward_n1` would take
# the verifier half a minute for each.
@pytest.mark.parametrize(
    'call',
    [
        Call(Sequence(1, 32, 20, 16)),
        Call(Cross(1, 5, 14, 32, 2)),
        Call(Factors(1, 3, 5, 16, 1, rank=2), torch.float16, kernels='scan_forward_n1'),
        Call(Wavefront(1, 9, 2, 20, 2), kernels='wavefront_forward'),
        Call(Wavefront(1, 2, 3, 10, 2), torch.float16, kernels='wavefront_backward'),
    ],
    ids=str,
)
def test_a_missing_barrier_is_found(call: Call) -> None:
    for launch in call.launches():
        results = results_without_barriers(launch)
        print(f'{launch.kernel}: {dict(results)}')
        assert results['potential_race'], launch.kernel


def test_a_row_that_is_overwritten_too_early_is_found() -> None:
    """The wavefront scan leaves the rows of a step in one of two buffers, and reads those of the step before."""
    (launch,) = Call(Wavefront(1, 9, 2, 20, 2), kernels='wavefront_forward').launches()
    ptx, symbol = prove.kernels('sm_90')[launch.kernel]
    part = prove.entry(ptx, symbol)
    edited, count = re.subn(r'xor\.b32\s+(%r\d+), (%r\d+), 1;', r'mov.b32 \1, \2;', ptx[part])
    assert count
    verdict = prove.verify(ptx[: part.start] + edited + ptx[part.stop :], prove.configuration(launch, symbol))
    assert verdict.result == 'potential_race', verdict


@pytest.mark.parametrize(('states', 'length'), [(2, 3), (2, 34), (16, 2)])
def test_in_real_numbers_outputs_follow_the_equations(states: int, length: int) -> None:
    call = Call(Sequence(1, 32, length, states, D=False, bias=False, softplus=False), kernels='scan_forward')
    (launch,) = call.launches()
    verdict = equivalence.prove_scan(launch, 'sm_90')
    print(f'| `{launch.kernel}` | {call} | {verdict} | {verdict.seconds:.0f} |')
    assert verdict.result == 'verified'


def test_in_real_numbers_gradients_follow_the_equations() -> None:
    """Of one position and state; more are not decided."""
    call = Call(Sequence(1, 32, 1, 1, D=False, bias=False, softplus=False), kernels='scan_backward')
    (launch,) = call.launches()
    verdict = equivalence.prove_gradients(launch, 'sm_90')
    print(f'| `{launch.kernel}` | {call} | {verdict} | {verdict.seconds:.0f} |')
    assert verdict.result == 'verified'
