"""A pytest plugin: `ldmfast` takes its C++ modules from the folder LDMFAST_SANITIZED, on one thread of torch's."""

from __future__ import annotations

import os

import torch

import ldmfast

FOLDER = os.environ["LDMFAST_SANITIZED"]
ldmfast.__path__.insert(0, FOLDER)
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "4")))


def pytest_report_header():
    from ldmfast.ops import native

    found = native.module("cpu")
    assert found.__file__.startswith(FOLDER), f"{found.__file__} is not the module under test"
    return f"sanitized: {found.__file__}, {found.active_isa()}"
