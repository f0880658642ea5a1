"""Every op, backend and dtype within the error budget, on the U-Net's shapes and the awkward ones.

`python tests/ops/test_ops_numbers.py [--big]` prints the table of worst errors instead.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for a run as a script

from cases import CASES, DTYPES, emulated, errors, home

from ldmfast.ops.registry import OPS, RANKS

BACKENDS = tuple(reversed(RANKS))  # Triton's interpreter needs a process of its own (tests/ops/test_triton.py)


def refusal(case, dtype, backend):
    args, kwargs = case.make(dtype)
    op = OPS[case.op]
    if backend not in op.backends:
        return "it has no such kernel"
    return op.backends[backend].refusal(op.normalise(*args, **kwargs))


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Fresh memory is NaN, so that an element which a kernel leaves out is seen."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op}-{case.label}")
def test_within_budget(case, backend, dtype):
    with torch.device(home(backend)):
        reason = refusal(case, dtype, backend)
        if reason:
            pytest.skip(f"{backend}: {reason}")
        if case.big and emulated(backend):
            pytest.skip(f"{backend} is emulated here: the small shape of the same kind runs")
        error, budget = errors(case, dtype, backend)
    assert error <= budget


def worst_row(op, backend, dtype, big):
    """(worst (error, budget, label), cases that ran, the last refusal): nearest to its budget counts as worst."""
    worst, ran, reason = None, 0, None
    for case in CASES:
        if case.op != op.name or case.big and emulated(backend) and not big:
            continue
        with torch.device(home(backend)):
            refused = refusal(case, dtype, backend)
            if refused:
                reason = refused
                continue
            error, budget = errors(case, dtype, backend)
        ran += 1
        if worst is None or not error / budget <= worst[0] / worst[1]:
            worst = error, budget, case.label
    return worst, ran, reason


def main() -> int:
    failed = 0
    torch.use_deterministic_algorithms(True, warn_only=True)
    for op, backend, dtype in itertools.product(OPS.values(), BACKENDS, DTYPES):
        worst, ran, reason = worst_row(op, backend, dtype, "--big" in sys.argv)
        line = f"{op.name:<16} {backend:<10} {str(dtype).removeprefix('torch.'):<9}"
        if not ran:
            print(f"{line} refuses: {reason}")
            continue
        right = worst[0] <= worst[1]
        failed += not right
        print(
            f"{line} {ran:>3} cases, nearest its budget: error {worst[0]:.2e} of {worst[1]:.2e} ({worst[2]})"
            f"{'' if right else '  FAILS'}{f'; some refused: {reason}' if reason else ''}",
            flush=True,
        )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
