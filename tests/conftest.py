"""What the tests share: the seed, and the error budget of STYLE (an op against the reference in its own dtype)."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
