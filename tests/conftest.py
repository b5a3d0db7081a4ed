"""What all tests share."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Every test starts from the same random state, whichever ran before it."""
    torch.manual_seed(0)
