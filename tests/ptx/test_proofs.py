"""The kernels' threads are ordered in every schedule, by the word of a verifier: ``make prove``."""

import collections
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.cuda_emulation.emulate import ROOT, compiler
from tests.ops.helpers import dtype_name
from tests.ops.route_cases import Cross, Sequence
from tests.ops.wavefront_cases import Wavefront
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


def case_id(value: object) -> str:
    return dtype_name(value) if isinstance(value, torch.dtype) else f'{type(value).__name__.lower()}-{value}'


def prove_launch(launch: prove.Launch, arch: str, barriers: bool = True) -> list[prove.Verdict]:
    """The verdict on a launch; or with each of its barriers left out, the verdicts."""
    ptx, symbol = prove.kernels(arch)[launch.kernel]
    given = prove.configuration(launch, symbol)
    return [prove.verify(text, given) for text in ([ptx] if barriers else prove.without_barriers(ptx, symbol))]


@pytest.mark.parametrize(('case', 'dtype'), prove.CASES, ids=case_id)
@pytest.mark.parametrize('arch', prove.ARCHS)
def test_no_schedule_has_a_race(arch, case, dtype, table) -> None:
    for launch in prove.record(case, dtype):
        (verdict,) = prove_launch(launch, arch)
        row = f'| `{launch.kernel}` | {case_id(case)} | {arch} | {verdict} | {verdict.seconds:.0f} |'
        print(row)
        table.append(row)
        limit = LIMITS.get(launch.kernel.partition('<')[0])
        if limit:
            assert verdict.result == 'unsupported' and limit in verdict.reason, row
        else:
            assert verdict.result == 'race_free', row


# Not every barrier counts at these sizes: some order several warps, chunks or work items. The kernels that are left out
# take the verifier minutes for each barrier, or are undecided without it.
@pytest.mark.parametrize(
    ('case', 'kernels'),
    [
        (Sequence(1, 32, 40, 16), ('scan_forward', 'scan_backward')),
        (Cross(1, 12, 12, 32, 2), ('segment_aggregates', 'state_passing', 'scan_forward')),
        (Wavefront(1, 9, 9, 20, 2), ('wavefront_forward',)),
    ],
    ids=case_id,
)
def test_a_missing_barrier_is_found(case, kernels) -> None:
    for launch in prove.record(case, torch.float32):
        if launch.kernel.partition('<')[0] in kernels:
            results = collections.Counter(verdict.result for verdict in prove_launch(launch, 'sm_90', barriers=False))
            print(launch.kernel, case, dict(results))
            assert results['potential_race'], results


@pytest.mark.parametrize(('states', 'length'), [(2, 3), (2, 34), (16, 2)])
def test_in_real_numbers_outputs_follow_the_equations(states, length) -> None:
    case = Sequence(1, 32, length, states, D=False, bias=False, softplus=False)
    (launch,) = (each for each in prove.record(case, torch.float32) if each.kernel.startswith('scan_forward'))
    verdict = equivalence.prove_row(launch, 'sm_90')
    print(f'| `{launch.kernel}` | {case} | {verdict} | {verdict.seconds:.0f} |')
    assert verdict.result == 'verified'
