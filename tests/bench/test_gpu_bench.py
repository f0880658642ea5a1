"""bench/gpu.sh without a GPU: a dry run of every stage, and what becomes of rows, red tests and a lost device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ldmfast.commands import bench_files
from ldmfast.commands.measuring import classes, clock, rows
from ldmfast.files import read_json
from ldmfast.ops.registry import OPS

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "bench" / "gpu"), str(ROOT / "bench" / "checks")]

import clocks  # noqa: E402
import launches as launch_counts  # noqa: E402
import op_table  # noqa: E402
import predicted  # noqa: E402
import record  # noqa: E402
import run as runner  # noqa: E402
import stages  # noqa: E402


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """OUT of a dry run of every stage."""
    out = tmp_path_factory.mktemp("gpu")
    command = ["bash", str(ROOT / "bench" / "gpu.sh"), str(out), "--dry"]
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return out


def named(file: Path) -> dict:
    return {row["name"]: row for row in read_json(file)["rows"]}


@pytest.mark.parametrize("script", ["op_table", "layer_table", "sanitize"])
def test_what_measures_ops_needs_no_diffusers(script):
    """Which a GPU machine may lack: the tests of stage A, the ops and the layers are measured all the same."""
    paths = [str(ROOT), *(str(ROOT / room) for room in ("tests", "tests/ops", "bench/gpu"))]
    code = f"import sys; sys.path[:0] = {paths}; sys.modules['diffusers'] = None\n"
    code += f"import {script}, test_ops_numbers, test_backward, test_ops_contract"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_dry_run_goes_through_every_command_of_every_stage(dry):
    found = named(dry / "stages.json")
    assert list(found) == [f"{stage} {command.name}" for stage, of in stages.STAGES.items() for command in of]
    assert {row["rc"] for row in found.values()} == {0}


@pytest.mark.parametrize("work, ours", [("step", 7), ("sdxl", 4), ("vae", 3), ("train", 1)])
def test_a_steps_rows_are_there_and_ours_agrees_with_diffusers(dry, work, ours):
    found = read_json(dry / f"{work}.json")
    name = "sd15" if work == "step" else work
    assert [row["key"] for row in found["rows"]] == [row.key for row in rows.rows_of(name)]
    timed = [row for row in found["rows"] if "median_ms" in row]
    assert sum(row["name"].startswith("ldmfast") for row in timed) >= min(ours, 3 if work != "train" else 1)
    for row in found["rows"]:
        assert ("median_ms" in row) != ("refused" in row) and "error" not in row
        assert row.get("difference_to_diffusers", 0.0) < 1e-5
    assert {"device", "torch", "commit", "red", "dtype"} <= found.keys()
    assert bench_files.read(dry / f"{work}.json")["kind"] == "step"  # `ldmfast report` draws it


def test_the_profile_has_every_class(dry):
    for key in ("ours-graph", "stock-graph", "ours"):
        found = read_json(dry / "profile" / f"{key}.json")
        assert [part["part"] for part in found["parts"]] == list(classes.CLASSES)


def test_the_op_table_has_every_backend_pytorchs_attentions_and_the_roofs(dry):
    found = named(dry / "ops.json").values()
    assert {"copy of 32768 bytes", "product 64 cubed"} == {row["shape"] for row in found if row["op"] == "roof"}
    attention = {row["backend"]: row for row in found if row["op"] == "attention"}
    assert {"cuda", "triton", "sdpa", "cudnn", "eager", *(f"SDPA {name}" for name in rows.SDPA)} <= attention.keys()
    assert {f"{op}_backward" for op in ("attention", "group_norm_silu", "timestep_mlp")} <= {row["op"] for row in found}
    for row in found:
        if row["op"] != "roof" and "refused" not in row:
            assert row["hot_us"] > 0 and row["cold_us"] > 0 and row["host_us"] > 0 and row["percent_of_roof"] > 0


def test_the_layers_have_rates(dry):
    for row in named(dry / "layers.json").values():
        ways = ("guessed", "ours", "measured") if row["op"] == "conv2d" else ("guessed", "ours")
        assert all(row[f"{way}_tflops"] >= 0 and row[f"{way}_us"] > 0 for way in ways)


def test_the_machines_own_speeds_come_home(dry):
    (file,) = (dry / "speeds").glob("*.json")
    assert {row["op"] for row in read_json(file)["rows"]} > {"attention", "ddim_step"}


def test_the_time_of_each_stage_is_bounded():
    assert stages.STAGE < 9 * 60
    for commands in stages.STAGES.values():
        assert all(0 < command.limit <= stages.STAGE for command in commands)


@pytest.mark.parametrize("words", [("ncu", "--sett", "full"), ("ncu", "--set"), ("compute-sanitizer", "--toll", "x")])
def test_a_tools_option_that_is_none_is_found_in_the_dry_run(words):
    with pytest.raises(ValueError, match=words[0]):
        stages.check_tool(words)


# --- rows -------------------------------------------------------------------------------------------------------------


def fail(error):
    def figures():
        raise error

    return figures


def test_each_row_is_on_the_disk_when_it_is_measured_and_a_failure_is_one_too(tmp_path, monkeypatch):
    monkeypatch.setenv(record.RED, "A cuda,A build")
    file = tmp_path / "x.json"
    found = record.Record(file, {"what": "x"})
    found.measure("first", lambda: {"hot_us": 1.0})
    assert named(file)["first"]["hot_us"] == 1.0 and read_json(file)["red"] == ["A cuda", "A build"]
    found.measure("second", fail(ValueError("no")))
    found.measure("third", fail(NotImplementedError("takes no float64")))
    assert named(file)["second"]["error"] == "ValueError: no" and named(file)["third"]["refused"] == "takes no float64"
    assert found.status == 1


def test_a_lost_device_ends_the_process_and_the_next_one_goes_on_behind_the_row(tmp_path):
    file = tmp_path / "x.json"
    found = record.Record(file, {})
    found.measure("right", lambda: {"hot_us": 1.0})
    out_of_memory = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    found.measure("too large", fail(out_of_memory))
    with pytest.raises(record.DeviceLost):
        found.measure("bad", fail(RuntimeError("CUDA error: an illegal memory access was encountered")))
    again = record.Record(file, {}, resume=True)
    assert again.measure("right", fail(AssertionError("is not measured again")))["hot_us"] == 1.0
    assert "illegal" in again.measure("bad", fail(AssertionError))["error"]
    again.measure("after", lambda: {"hot_us": 2.0})
    assert list(named(file)) == ["right", "too large", "bad", "after"]


def options(out, **changes):
    return SimpleNamespace(**{"out": out, "dry": False, "resume": False, "carried": None, "only": [], **changes})


def test_a_command_that_loses_its_device_is_started_again(tmp_path):
    text = "import sys; open(sys.argv[1], 'a').write(f'{sys.argv[2:]}'); "
    text += f"sys.exit(0 if '--resume' in sys.argv else {record.LOST})"
    command = stages.Command("x", ("-c", text, "OUT/starts"), 20, json="x.json")
    assert runner.result(command, options(tmp_path), time.time() + 20)["rc"] == 0
    assert (tmp_path / "starts").read_text() == "[]['--resume']"


def test_a_command_is_cut_at_its_limit_with_all_that_it_started(tmp_path):
    text = "import subprocess, sys, time; subprocess.Popen(['sleep', '60']); print('begun', flush=True); time.sleep(60)"
    begin = time.time()
    found = runner.result(stages.Command("x", ("-c", text), 6), options(tmp_path), time.time() + 500)
    assert found["rc"] == 124 and "begun" in found["said"] and time.time() - begin < 30


def test_a_tool_that_is_missing_and_a_stage_without_time_are_said(tmp_path):
    missing = stages.Command("x", ("-c", "1"), 20, tool=("no-such-tool",))
    assert runner.result(missing, options(tmp_path), time.time() + 20) == {
        "rc": 127,
        "said": "no-such-tool is not on PATH",
    }
    late = runner.result(stages.Command("x", ("-c", "1"), 20), options(tmp_path), time.time())
    assert late["rc"] == 124 and "time of the stage" in late["said"]


def test_what_is_red_is_said_and_so_is_that_no_test_ran(tmp_path):
    found = record.Record(tmp_path / "stages.json", {})
    assert runner.red(found) == ["the tests of stage A did not run here"]
    found.measure("A cuda", lambda: {"rc": 0})
    assert runner.red(found) == []
    found.measure("C triton", lambda: {"rc": 1})
    assert runner.red(found) == ["C triton"]


def test_the_tests_are_counted(tmp_path):
    file = tmp_path / "x.xml"
    suite = '<testsuite tests="3" failures="1" errors="0" skipped="1"><testcase name="a"/><testcase name="b"><failure/>'
    file.write_text(f"<testsuites>{suite}</testcase></testsuite></testsuites>")
    assert runner.counts(file) == {"tests": 3, "skipped": 1, "failed": 1, "first": ["b"]}


def test_tests_that_were_all_skipped_are_red(tmp_path):
    text = "import sys; open(sys.argv[1], 'w').write('<testsuite tests=\\'2\\' skipped=\\'2\\' failures=\\'0\\'/>')"
    found = runner.result(stages.Command("x", ("-c", text, "OUT/x.xml"), 20), options(tmp_path), time.time() + 20)
    assert found["rc"] == 5 and found["said"] == "every test was skipped"


def test_modules_of_another_python_are_not_taken(tmp_path):
    (tmp_path / "modules" / "ldmfast").mkdir(parents=True)
    (tmp_path / "modules" / "ldmfast" / "_cpu.cpython-399-x86_64-linux-gnu.so").touch()
    with pytest.raises(SystemExit, match="has no modules for"):
        runner.unpack(tmp_path, tmp_path)


# --- predictions ------------------------------------------------------------------------------------------------------


def test_predictions_are_marked_lie_above_their_floors_and_are_of_rows_that_are_measured(tmp_path):
    about = read_json(predicted.PREDICTED)
    shapes = {(case.op, case.shape) for case in op_table.LARGE}
    sizes = {}
    for name in {row["op"] for row in about["rows"] if row["shape"].endswith("example")}:
        timed = next(op_table.example(OPS[name], torch.float16, "cpu"))
        sizes[name, timed.about["shape"]] = timed.size
    for row in about["rows"]:
        key = row["op"].removesuffix("_backward"), row["shape"]
        assert key in shapes or sizes[key] == row["bytes"]
        assert predicted.floor_us(row, about) < row["us"][0] <= row["us"][1] and row["why"]
    launches = sum(counted.total() for counted in (launch_counts.counted_call(), launch_counts.counted_update()))
    assert f"With {launches} launches" in about["steps"][0]["why"]
    lines = predicted.table(None)
    assert "none of these times was measured" in lines[0] and sum("not yet" in line for line in lines) == len(
        [*about["rows"], *about["steps"]]
    )
    row = {key: about["rows"][0][key] for key in ("op", "shape", "dtype", "backend")}
    (tmp_path / "ops.json").write_text(json.dumps({"rows": [{"name": "x", **row, "hot_us": 5.75}]}))
    (tmp_path / "step.json").write_text(json.dumps({"rows": [{"name": "x", "key": "ours-graph", "median_ms": 5.5}]}))
    found = predicted.table(tmp_path)
    assert found[4].endswith("| 5.75 |") and any(line.endswith("| 5.5 |") for line in found)


# --- clocks -----------------------------------------------------------------------------------------------------------


def test_the_clocks_of_a_row_are_those_read_while_it_ran():
    lines = "import time\nfor i in range(20): "
    lines += "print(f'{1000 + i}, 2000, 300.5, {\"[N/A]\" if i == 3 else 40}', flush=True); time.sleep(0.02)"
    begin, watched = time.time(), clocks.Clocks([sys.executable, "-c", lines])
    watched.process.wait()
    watched.thread.join(5)
    found = watched.within(begin, time.time())["clocks"]
    watched.stop()
    assert found["sm_mhz"][0] == 1000 and found["sm_mhz"][2] == 1019 and found["celsius"] == [40, 40, 40]
    assert len(watched.readings) == 19 and watched.within(0, 1) == {}


def test_cold_launches_go_round_twice_the_cache():
    device = clock.StandIn()
    assert clock.rounds_for_cold(device, device.cache_bytes) == 2
    assert clock.rounds_for_cold(device, device.cache_bytes // 8) == 16
    assert clock.rounds_for_cold(device, 1) == clock.MOST_LAUNCHES
    order = []
    clock.per_call(device, [lambda: order.append("a"), lambda: order.append("b")], 0, launches=4)
    assert order[:4] == ["a", "b", "a", "b"]


def test_every_row_of_a_step_has_settings_that_torch_knows():
    device = clock.StandIn()
    for row in rows.BY_KEY.values():
        with rows.settings(row):
            assert torch.backends.cudnn.benchmark == row.measured
        assert not row.compiled or device.compiled(len, row.compiled, True) is len
    assert not torch.backends.cudnn.benchmark
    with pytest.raises(ValueError, match="no mode 'fast'"):
        device.compiled(len, "fast", True)
