"""What older versions of torch cannot do, whoever asks; the tests of it are skipped there."""

import sys

import pytest
import torch

from cuda_ops._torch_compat import RELEASE

since_torch_2_4 = pytest.mark.skipif(
    RELEASE < (2, 4), reason='torch.compile, torch.func and custom operators need torch 2.4'
)
# findings/onnxruntime-amx-products.sh
since_python_3_11 = pytest.mark.skipif(
    sys.version_info < (3, 11), reason='the last onnxruntime for Python 3.10 multiplies 8-bit integers wrongly'
)


def needs_float16(dtype: torch.dtype) -> None:
    """Skip a test that computes in float16 on a CPU where torch has no matrix products and no autocast of it."""
    if dtype == torch.float16 and RELEASE < (2, 4):
        pytest.skip('torch computes little in float16 on CPUs before 2.4')
