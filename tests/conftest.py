"""What the tests share: the seed, and the error budget of STYLE (an op against the reference in its own dtype)."""

from __future__ import annotations

import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub reads it: a test that asks the hub would wait for minutes
os.environ["LDMFAST_SPEEDS"] = "off"  # what somebody measured on this machine changes no test

import pytest  # noqa: E402
import torch  # noqa: E402


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def accelerate_forgets():
    """accelerate keeps the first Accelerator's settings for the life of a process, and refuses others after it."""
    yield
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
