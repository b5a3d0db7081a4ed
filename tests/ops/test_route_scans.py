"""The three route scans against plain float64 loops, in every output and every gradient."""

import pytest
import torch

from tests.ops.helpers import DTYPES, dtype_name
from tests.ops.route_cases import CASES, Case, Cross, case_id, check
from tests.versions import needs_float16


@pytest.mark.parametrize('dtype', DTYPES, ids=dtype_name)
@pytest.mark.parametrize('case', CASES, ids=case_id)
def test_scan_and_gradients_equal_the_loop(case: Case, dtype: torch.dtype) -> None:
    if hasattr(case, 'rank'):  # projected by a product of matrices
        needs_float16(dtype)
    check(case, dtype)


def test_a_long_scan_keeps_its_precision() -> None:
    check(Cross(1, 56, 56, 96, 1), torch.float32)
