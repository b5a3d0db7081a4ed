"""In half precision the scans lose at most twice what PyTorch's own evaluation loses, with no floor below it."""

from __future__ import annotations

import pytest
import torch

import cuda_ops
from tests.ops import wavefront_cases
from tests.ops.helpers import dtype_name, rounded, three_ways
from tests.ops.route_cases import Cross, Factors, Lines, Sequence, case_id
from tests.ops.wavefront_cases import Wavefront

# Maps of the last stages, and of the first ones; long sums are where precision is lost. Of few channels the ratio would
# be chance: gradients of parameters, which are float32, differ by single roundings.
SMALL = (
    Cross(1, 14, 15, 96, 1),
    Factors(1, 14, 15, 96, 1, rank=6),
    Sequence(1, 96, 210, 4, B=0, C=0),
    Sequence(1, 96, 210, 4),
    Lines(1, 14, 15, 96, 4, 'row'),
    Wavefront(1, 14, 15, 96, 4),
)
LARGE = (
    Cross(1, 56, 56, 96, 1),
    Factors(1, 56, 56, 96, 1, rank=6),
    Sequence(1, 512, 3136, 1, B=0, C=0),  # nearly all the error is that of the few channels that decay slowest
    Sequence(1, 64, 3136, 16),
    Lines(1, 56, 56, 96, 16, 'column', reverse=True),
    Wavefront(1, 56, 56, 64, 16),
)


@pytest.mark.parametrize('dtype', (torch.bfloat16, torch.float16), ids=dtype_name)
@pytest.mark.parametrize('case', (*SMALL, *(pytest.param(case, marks=pytest.mark.slow) for case in LARGE)), ids=case_id)
def test_errors_are_at_most_twice_pytorch_s(case: Cross | Sequence | Lines | Wavefront, dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    if isinstance(case, Wavefront):
        function, loop, parameters = cuda_ops.wavefront_scan, wavefront_cases.loop, wavefront_cases.PARAMETERS
    else:
        function, loop, parameters = case.function, case.loop, case.parameters()
    got, reference, exact = three_ways(function, loop, rounded(case.inputs(), parameters, dtype), case.options())
    worse = {}
    for name, value in exact.items():
        error, other = ((result[name].double() - value).norm().item() for result in (got, reference))
        if error > 2 * other:
            worse[name] = error / other if other else float('inf')
    assert not worse
