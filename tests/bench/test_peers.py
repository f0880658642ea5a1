"""bench/peers: engines in processes of their own are compared, take turns, and are left out with a sentence."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).resolve().parents[2] / "bench"
sys.path[:0] = [str(BENCH), str(BENCH / "peers")]

import compare  # noqa: E402
import engine  # noqa: E402
import parts  # noqa: E402

JOB = {"work": "unet", "dtype": "float32", "size": 64, "batch": 1}
# a peer that answers as bench/peers/worker.py does: what it computes, and when it ends, are its arguments
PEER = """
import json, sys, time
import torch
value, ends_after, log, name = float(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
runs = 0
for wish in map(json.loads, iter(sys.stdin.readline, "")):
    with open(log, "a") as lines:
        lines.write(f"{name} {next(iter(wish))}\\n")
    if "prepare" in wish:
        path = f"{log}.{name}.pt"
        torch.save(torch.full((8,), value), path)
        answer = {"output": path, "prepare_s": 0.1, "first_s": 0.2, "prepare_mib": 9.0, "held_mib": 4.0}
    else:
        runs += 1
        if runs > ends_after:
            sys.exit("out of paper")
        answer = {"seconds": 0.5 * runs, "memory_mib": 7.0, "idle_cpu_s": 0.0}
    print(json.dumps(answer), flush=True)
"""


@pytest.fixture
def start(tmp_path):
    """What compared() starts engines with: {name: (what it computes, how often it runs)}."""
    (tmp_path / "peer.py").write_text(PEER)
    log = tmp_path / "log"

    def of(peers):
        def begin(name, patience):
            if name not in peers:
                raise engine.Failed("is not installed in nowhere")
            value, runs = peers[name]
            command = [sys.executable, str(tmp_path / "peer.py"), str(value), str(runs), str(log), name]
            return engine.Engine(name, patience, command, cache=tmp_path / "cache")

        return begin

    of.log = log
    return of


def test_engines_take_turns_and_a_row_has_their_medians(start):
    said = []
    found = compare.compared(
        ["stock", "ldmfast"], JOB, 3, 60, start({"stock": (1, 9), "ldmfast": (1.0001, 9)}), said.append
    )
    assert start.log.read_text().split("\n")[2:-1] == ["stock run", "ldmfast run"] * 3
    assert found["ldmfast"]["times_s"] == [0.5, 1.0, 1.5] and found["ldmfast"]["median_s"] == 1.0
    assert found["ldmfast"]["error"] == pytest.approx(1e-4, rel=1e-2) and found["stock"]["error"] == 0
    assert found["ldmfast"]["memory_mib"] == 7.0 and len(said) == 2


def test_a_row_says_what_its_differences_are_from(start, capsys):
    peers = {"ldmfast": (1, 9), "compile": (1, 9)}
    found = compare.compared(["ldmfast", "compile"], JOB, 1, 60, start(peers), [].append)
    compare.print_row(JOB, found)
    said = capsys.readouterr().out
    assert said.count("0.0e+00 from ldmfast") == 2  # there was no stock
    assert said.count("7 MiB (3 over what it held before)") == 2


def test_a_group_without_stock_is_held_to_what_stock_computed_before(start):
    peers, wanted = {"ldmfast": (1.0001, 9), "compile": (1.1, 9)}, torch.full((8,), 1.0)
    found = compare.compared(["ldmfast", "compile"], JOB, 1, 60, start(peers), [].append, wanted)
    assert found["ldmfast"]["compared_with"] == "stock"
    assert found["ldmfast"]["error"] == pytest.approx(1e-4, rel=1e-2)
    assert found["compile"] == {"left_out": "computes something else: 1.0e-01 from stock, more than 0.001"}


@pytest.mark.parametrize(
    "peers, reason",
    [
        ({"stock": (1, 9)}, "is not installed in nowhere"),
        ({"stock": (1, 9), "compile": (1.1, 9)}, "computes something else: 1.0e-01 from stock, more than 0.001"),
        ({"stock": (1, 9), "compile": (float("nan"), 9)}, "computes something else: nan from stock, more than 0.001"),
        ({"stock": (1, 9), "compile": (1, 1)}, "failed: out of paper"),
    ],
    ids=["missing", "wrong numbers", "no numbers", "ends in a round"],
)
def test_an_engine_is_left_out_with_a_sentence_and_the_others_are_measured(start, peers, reason):
    said = []
    found = compare.compared(["stock", "compile"], JOB, 2, 60, start(peers), said.append)
    assert found["compile"] == {"left_out": reason} and f"compile is left out: it {reason}." in said
    assert len(found["stock"]["times_s"]) == 2 and found["stock"]["median_s"] == 0.75


def test_an_engine_that_does_not_answer_is_ended(tmp_path):
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    found = engine.Engine("sleeper", 0.5, command, cache=tmp_path)
    with pytest.raises(engine.Failed, match="took longer than 0 s"):
        found.ask({"run": True})
    found.close()
    assert found.process.returncode


def test_an_openvino_that_is_not_there_is_said(tmp_path):
    with pytest.raises(engine.Failed, match="is not installed in .*openvino-1.0"):
        engine.Engine("openvino-1.0", 1, cache=tmp_path)


def test_memory_decides_who_runs_together():
    names = ["ldmfast", "stock", "compile", "openvino-1", "openvino-2"]
    assert engine.groups(names, JOB, 100) == ([["stock", "ldmfast", "compile", "openvino-1", "openvino-2"]], [])
    together, missing = engine.groups(names, JOB, 24)
    assert not missing and len(together) > 1 and all(group[:2] == ["stock", "ldmfast"] for group in together)
    assert {name for group in together for name in group} == set(names)
    assert engine.groups(names, {**JOB, "work": "sdxl"}, 24)[0] == []  # 9.6 GiB of weights each
    wide = {**JOB, "work": "sdxl", "dtype": "bfloat16"}  # stock's 4.8 GiB beside OpenVINO's 9.6 are too many
    apart = [["stock", "ldmfast"], ["ldmfast", "openvino-1"], ["ldmfast", "openvino-2"]]
    assert engine.groups(["ldmfast", "stock", "openvino-1", "openvino-2"], wide, 22) == (apart, [])
    assert engine.groups(["openvino-1"], JOB, 24) == ([["openvino-1"]], [])


def test_the_record_is_written_after_every_row(tmp_path, monkeypatch):
    file, seen = tmp_path / "peers.json", []

    def compared(names, job, rounds, patience):
        seen.append(json.loads(file.read_text())["rows"] if file.exists() else None)
        row = {"times_s": [2.0] * rounds, "median_s": 2.0, "memory_mib": 1.0, "error": 0.0, "compared_with": "stock"}
        return {"stock": row}

    monkeypatch.setattr(compare, "compared", compared)
    monkeypatch.setattr(compare, "available", lambda: 100.0)
    monkeypatch.setattr(compare, "CACHE", tmp_path)
    options = ["--work", "unet", "--size", "8", "16", "--dtype", "float32", "--peers", "stock", "--quick"]
    monkeypatch.setattr(sys, "argv", ["compare.py", *options, "--json", str(file)])
    # conftest.py is tests/' here; bench/'s has the machine
    monkeypatch.setitem(sys.modules, "conftest", type(sys)("conftest"))
    sys.modules["conftest"].machine = lambda: {"processor": "one"}
    assert compare.main() == 0
    found = json.loads(file.read_text())
    assert seen[0] is None and len(seen[1]) == 1 and [row["size"] for row in found["rows"]] == [8, 16]
    assert found["rounds"] == 2 and found["machine"] == {"processor": "one"} and "torch" in found["versions"]
    assert [path.name for path in tmp_path.iterdir()] == ["peers.json"]


def test_the_parts_of_a_pass_are_its_ops_and_the_rest():
    from ldmfast import ops

    x, weight = torch.randn(1, 8, 4, 4), torch.randn(16, 8, 3, 3)

    def run():
        ops.conv2d(x, weight, None, padding=1)
        ops.linear(torch.randn(3, 8), torch.randn(4, 8), None)
        q, k = torch.randn(1, 6, 2, 8), torch.randn(1, 5, 2, 8)
        ops.attention(q, q, q)
        ops.attention(q, k, k)

    whole, found = parts.passed(run)
    amounts = {name: part[2] for name, part in found.items()}
    assert amounts == {
        "convolution 3x3": 2 * 16 * 16 * 8 * 9,
        "linear": 2 * 3 * 4 * 8,
        "self-attention": 4 * 6 * 6 * 16,
        "cross-attention": 4 * 6 * 5 * 16,
    }
    rows = parts.record(whole, found, 1e9)
    assert rows[-1]["part"] == "rest" and sum(row["seconds"] for row in rows) == pytest.approx(whole, abs=1e-5)
    assert not any("run" in vars(op) for op in parts.OPS.values())  # nothing is watched any more
