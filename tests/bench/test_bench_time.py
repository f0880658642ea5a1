"""bench/timing.py: what is too slow is left out with a sentence, and a run ends."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))

import timing  # noqa: E402


class Time:
    """A clock that only calls advance."""

    def __init__(self):
        self.now = 0.0

    def call(self, seconds):
        def run(*args):
            self.now += seconds(*args) if callable(seconds) else seconds

        return run


@pytest.fixture
def clock(monkeypatch):
    found = Time()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: found.now)
    monkeypatch.setattr(timing, "BEGUN", 0.0)
    monkeypatch.setenv("LDMFAST_BENCH_DEVICE", "cpu")
    timing.device.cache_clear()
    yield found
    timing.device.cache_clear()


class Benchmark:
    """What measure_in_turn needs of pytest-benchmark's fixture."""

    def pedantic(self, function, setup, rounds, iterations):
        self.rounds, times = rounds, []
        for _ in range(rounds):
            setup()
            begin = self._timer()
            function()
            times.append(self._timer() - begin)
        self.stats = type("Stats", (), {"stats": type("Of", (), {"median": sorted(times)[len(times) // 2]})})


def test_a_call_that_would_take_too_long_is_told_by_a_part_of_it(clock):
    parts = timing.rows_of(512)
    assert timing.borne(clock.call(lambda rows: 0.001 * rows), parts, patience=1.0) == ""
    begin = clock.now
    said = timing.borne(clock.call(lambda rows: 0.1 * rows), parts, patience=4.0)
    assert said == "not measured: 1/32 of it takes 1.6 s, and one call may take 4.0 s"
    assert clock.now - begin < 5  # of 51 s


def test_what_every_call_costs_is_not_taken_for_work(clock):
    """8 ms of overhead are 4 s if they are taken for 1/512 of the work."""
    assert timing.borne(clock.call(lambda rows: 0.008 + 0.001 * rows), timing.rows_of(512), patience=1.0) == ""


def test_a_first_call_that_prepares_is_not_taken_for_work(clock):
    first = iter([3.0])
    probe = clock.call(lambda rows: next(first, 0.001 * rows))
    assert timing.borne(probe, timing.rows_of(512), patience=1.0) == ""


def test_nothing_is_begun_when_the_time_of_the_run_is_over(clock):
    clock.now = timing.BUDGET - 1
    assert timing.allowed(4.0) == 1.0
    clock.now = timing.BUDGET
    assert timing.borne(None, {}) == f"not measured: the {timing.BUDGET:.0f} s of this run are over"


def test_a_slow_peer_is_measured_once_and_ours_as_often_as_ever(clock):
    benchmark = Benchmark()
    found = timing.measure_in_turn(benchmark, clock.call(0.01), clock.call(2.0), seconds=0.6)
    assert found == (pytest.approx(0.01), pytest.approx(2.0), "measured once") and benchmark.rounds > 20
    assert timing.measure_in_turn(benchmark, clock.call(0.01), None, seconds=0.6)[1:] == (None, "")
    assert timing.measure_in_turn(benchmark, clock.call(0.01), clock.call(0.02), seconds=0.6)[1:] == (
        pytest.approx(0.02),
        "",
    )


def test_a_row_without_figures_says_why_and_has_no_ratio():
    row = timing.Row("linear", "eager", "4x4", "bf16", None, 8.0, "TFLOP/s", 1.0, note="not measured: x")
    assert row.line[4:] == ("", "", "", "") and row.rate is row.percent is row.ratio is None
    assert row.info()["note"] == "not measured: x" and "TFLOP/s" not in row.info()
