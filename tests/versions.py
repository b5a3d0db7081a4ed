"""What older versions of torch cannot do, whoever asks; the tests of it are skipped there."""

import pytest
import torch

from cuda_ops._torch_compat import RELEASE

since_torch_2_4 = pytest.mark.skipif(
    RELEASE < (2, 4), reason='torch.compile, torch.func and custom operators need torch 2.4'
)


def needs_float16(dtype: torch.dtype) -> None:
    """Skip a test that computes in float16 on a CPU where torch has no matrix products and no autocast of it."""
    if dtype == torch.float16 and RELEASE < (2, 4):
        pytest.skip('torch computes little in float16 on CPUs before 2.4')
