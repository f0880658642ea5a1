"""The CPU kernels in every instruction set that this machine has, the one in use apart: a process each.

The other tests run the best one only, and the kernels differ: in lanes, rows in registers, dot products.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ldmfast import ops
from ldmfast.ops import native

HERE = Path(__file__).parent
RUN = ("ops_numbers", "backward", "exact_rows", "weight_backward", "elements", "attention_integers")
NOT_HERE = "this processor does not have it"


def ran(isa, *command):
    environment = {**os.environ, "LDMFAST_CPU_ISA": isa}
    return subprocess.run(
        [sys.executable, *command], env=environment, cwd=HERE.parents[1], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512", "avx512_bf16", "amx"])
def test_the_numbers_of_an_instruction_set(isa):
    module = native.module("cpu")
    if isa not in module.compiled_isas().split():
        pytest.skip(f"{isa} is not compiled for this architecture")
    if isa == module.active_isa():
        pytest.skip(f"{isa} is the one that every other test runs")
    probe = ran(isa, "-c", "from ldmfast.ops import native; print(native.module('cpu').active_isa())")
    if probe.returncode and NOT_HERE in probe.stderr:
        pytest.skip(f"{isa}: {NOT_HERE}")
    assert probe.stdout.strip() == isa, probe.stderr
    names = [f"test_{name}.py" for name in RUN]
    found = ran(isa, "-m", "pytest", "-q", "-k", "cpu and not host", *(str(HERE / name) for name in names))
    assert found.returncode == 0, found.stdout[-4000:]
    assert "passed" in found.stdout.splitlines()[-1]


def test_torchs_products_are_what_they_were_between_ours():
    """oneDNN keeps a thread's tiles (AMX) from one call to the next; ours puts back what it found."""
    torch.manual_seed(0)
    x, w = torch.randn(150, 96).bfloat16(), torch.randn(80, 96).bfloat16()
    odd, other = torch.randn(37, 45).bfloat16(), torch.randn(29, 45).bfloat16()
    picture, kernel = torch.randn(1, 40, 13, 12).bfloat16(), torch.randn(35, 40, 3, 3).bfloat16()
    calls = [
        lambda: ops.linear(x, w, backend="cpu"),
        lambda: ops.linear(odd, other, backend="cpu"),
        lambda: ops.conv2d(picture, kernel, padding=1, backend="cpu"),
        lambda: torch.nn.functional.linear(x, w),
        lambda: torch.nn.functional.linear(odd, other),
        lambda: torch.nn.functional.conv2d(picture, kernel, padding=1),
    ]
    alone = [[call() for _ in range(3)][-1] for call in calls]
    for turn in range(len(calls)):
        for i in range(len(calls)):
            at = (i * (turn + 1) + turn) % len(calls)
            assert torch.equal(calls[at](), alone[at]), at
