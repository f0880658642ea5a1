"""What `make try` says of a run: which rows are slower than before, which numbers are outside their budget."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ldmfast.ops.registry import OPS

BENCH = Path(__file__).resolve().parents[2] / "bench"
sys.path.insert(0, str(BENCH))

import op_numbers  # noqa: E402
import op_speed  # noqa: E402


def run(ratio, noise=0.01, milliseconds=None):
    seconds = 1e-3 * (ratio if milliseconds is None else milliseconds)
    return {"commit": "abc", "when": "yesterday", "rows": {"forward 64x64": [seconds, ratio, noise]}}


def test_a_name_that_is_no_op_lists_them():
    command = [sys.executable, str(BENCH / "try_op.py"), "atention"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 2
    assert f"OP is 'atention', expected one of: {', '.join(OPS)}" in found.stderr


@pytest.mark.parametrize(
    "before, now, slower",
    [
        (run(1.0), run(1.1), ["forward 64x64, 1.10"]),
        (run(1.0), run(1.02), []),  # less than anybody names
        (run(1.0, noise=0.06), run(1.1, noise=0.06), []),
        (run(1.0), run(0.5), []),
        (run(1.0), run(9.0, milliseconds=0.9), []),  # the products of the first run were held up
        (None, run(1.0), []),
    ],
    ids=["slower", "by little", "within the noise of both", "faster", "busy before", "nothing before"],
)
def test_a_row_is_slower_beyond_the_noise_of_both_runs(before, now, slower):
    assert op_speed.print_table(now["rows"], before) == slower


def test_one_pass_far_out_is_no_noise():
    steady = [(1.0, 0.5), (1.01, 0.5), (0.99, 0.5), (1.0, 0.5)]
    seconds, ratio, noise = op_speed.summary([*steady, (9.0, 0.5)])
    assert (seconds, ratio) == (1.0, 2.0) and noise == pytest.approx(0.02)
    assert op_speed.summary([*steady[:3], (9.0, 0.5), (9.0, 0.5)])[2] > 1


def test_a_run_is_compared_with_the_last_of_its_machine(tmp_path):
    file = tmp_path / "attention.jsonl"
    assert op_speed.before(file, "mine", None) is None
    runs = [("mine", "a1"), ("mine", "b2"), ("other", "c3")]
    file.write_text("".join(json.dumps({"machine": m, "commit": c}) + "\n" for m, c in runs))
    assert op_speed.before(file, "mine", None)["commit"] == "b2"
    assert op_speed.before(file, "mine", "a")["commit"] == "a1"
    assert op_speed.before(file, "mine", "c3") is None


def test_a_number_outside_its_budget_is_named():
    line = {"what": "forward", "dtype": "float32", "ran": 2, "of": 2, "budget": 1e-6, "case": "odd", "refused": None}
    rows = [{**line, "backend": "cpu", "error": 1e-7}, {**line, "backend": "triton", "error": 2e-6}]
    assert op_numbers.print_table(rows) == ["triton forward float32 (odd)"]
    assert len(op_numbers.print_table([{**line, "backend": "cpu", "error": float("nan")}])) == 1
