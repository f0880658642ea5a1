"""The machine's own table: which backend it makes the choice, how near a shape must be, and what of it is refused."""

from __future__ import annotations

import json
import warnings

import pytest
import torch

from ldmfast import ops
from ldmfast.commands import cli
from ldmfast.ops.measured import tuned
from ldmfast.ops.registry import OPS

CPU = torch.device("cpu")


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv(tuned.VARIABLE, str(tmp_path))
    tuned.forget()
    yield tmp_path
    monkeypatch.undo()
    tuned.forget()


def row(op, args, **seconds):
    op = OPS[op]
    dtype = str(args[op.lead].dtype).removeprefix("torch.")
    return {"op": op.name, "dtype": dtype, "sizes": op.sizes(*args), "seconds": seconds}


def attention_args(L=64, D=40, dtype=torch.float32):
    q = torch.zeros(1, L, 2, D, dtype=dtype)
    return OPS["attention"].normalise(q, q, q)


def chosen(args):
    return OPS["attention"].select(args).name


def test_what_was_measured_here_goes_before_what_is_shipped(place):
    args = attention_args()
    assert chosen(args) == "cpu"
    tuned.write(CPU, [row("attention", args, cpu=2e-5, torch=1e-5)], "2026-01-02")
    assert chosen(args) == "torch"
    assert OPS["attention"].select(args, "cpu").name == "cpu"  # named, it runs
    said = ops.explain(ops.attention, *args[:3])
    assert "cpu        could run, slower here: torch is faster (measured on this machine: 10 against 20 us" in said
    assert f"chosen by `ldmfast tune` on this machine, 2026-01-02 ({place}" in said
    tuned.write(CPU, [row("attention", args, cpu=1e-5, torch=2e-5)], "2026-01-03")
    assert chosen(args) == "cpu" and "slower here: cpu is faster" in ops.explain(ops.attention, *args[:3])


def test_a_backend_that_takes_as_long_is_not_slower(place):
    args = attention_args()
    tuned.write(CPU, [row("attention", args, cpu=1.02e-5, torch=1e-5)], "today")
    assert chosen(args) == "cpu"


@pytest.mark.parametrize(
    "other, holds",
    [({"L": 100}, True), ({"L": 129}, False), ({"D": 48}, False), ({"dtype": torch.bfloat16}, False)],
    ids=["longer", "much longer", "another width", "another dtype"],
)
def test_a_point_holds_for_what_is_near(place, other, holds):
    tuned.write(CPU, [row("attention", attention_args(), cpu=2e-5, torch=1e-5)], "today")
    assert chosen(attention_args(**other)) == ("torch" if holds else "cpu")


def test_the_nearest_point_counts(place):
    rows = [
        row("attention", attention_args(L=64), cpu=2e-5, torch=1e-5),
        row("attention", attention_args(L=128), cpu=1e-5, torch=2e-5),
    ]
    tuned.write(CPU, rows, "today")
    assert [chosen(attention_args(L=L)) for L in (80, 110)] == ["torch", "cpu"]


def test_under_the_exact_contract_speed_does_not_choose(place):
    args = attention_args()
    tuned.write(CPU, [row("attention", args, cpu=2e-5, torch=1e-5)], "today")
    with ops.numerics("exact"):
        assert chosen(args) == "cpu"


def test_without_a_table_the_shipped_one_is_named(place):
    assert "chosen by the backends' ranks" in ops.explain(ops.attention, *attention_args()[:3])
    x, weight = torch.zeros(1, 640, 32, 32), torch.zeros(4, 640, 1, 1)
    assert "chosen by ldmfast's own table, measured on another machine" in ops.explain(ops.conv2d, x, weight)


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '{"rows": []}', '{"when": "x", "rows": [{"op": "attention"}]}', "nan"],
    ids=["cut off", "a list", "no date", "a row without times", "no JSON"],
)
def test_a_damaged_table_is_warned_of_and_not_used(place, text):
    tuned.path_of(CPU).write_text(text)
    with pytest.warns(UserWarning, match="is damaged and is not used"):
        assert chosen(attention_args()) == "cpu"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once a process
        assert chosen(attention_args()) == "cpu"


def test_another_number_of_threads_is_another_machine(place):
    path, threads = tuned.path_of(CPU), torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert tuned.path_of(CPU) != path
    finally:
        torch.set_num_threads(threads)


def test_the_command_measures_chooses_and_clears(place, capsys):
    command = ["tune", "--tiny", "--work", "sd15", "--seconds", "0", "--op", "attention", "--device", "cpu"]
    assert cli.main(command) == 0
    said = capsys.readouterr().out
    content = json.loads(tuned.path_of(CPU).read_text())
    assert str(tuned.path_of(CPU)) in said and content["machine"]["torch"] == torch.__version__
    assert {row["op"] for row in content["rows"]} == {"attention"}
    for found in content["rows"]:
        assert {"cpu", "torch"} <= found["seconds"].keys() and str(found["sizes"]["L"]) in said
    first = content["rows"][0]
    q, k = (torch.zeros(2, first["sizes"][n], first["sizes"]["heads"] // 2, first["sizes"]["D"]) for n in "LS")
    best = min(first["seconds"], key=first["seconds"].get)
    assert first["seconds"][chosen(OPS["attention"].normalise(q, k, k))] <= tuned.NEAR * first["seconds"][best]
    assert cli.main(["tune", "--clear"]) == 0 and not list(place.glob("*.json"))
    assert "removed" in capsys.readouterr().out


def test_the_command_says_what_it_cannot_do(place, capsys, monkeypatch):
    assert cli.main(["tune", "--op", "atention"]) == 2
    assert "--op atention is no op; there are" in capsys.readouterr().err
    monkeypatch.setenv(tuned.VARIABLE, "off")
    assert cli.main(["tune", "--tiny", "--device", "cpu"]) == 2
    assert "LDMFAST_SPEEDS=off" in capsys.readouterr().err
