"""What the benchmarks share: the clock, the rows of the closing table, and the roofs that they are compared with.

A run measures one device: the GPU where there is one, else the CPU (LDMFAST_BENCH_DEVICE=cpu|cuda decides otherwise).

A run ends in BUDGET seconds on every processor. One without bfloat16 takes 40 s for a product that takes another 40 ms:
before a call that may be so slow, a small part of it is timed, and what would take longer than its row may is left out
with a sentence. A call that takes longer than all rounds should is measured once.
"""

from __future__ import annotations

import functools
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@functools.cache
def device() -> str:
    return os.environ.get("LDMFAST_BENCH_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")


class Clock:
    """Seconds for pytest-benchmark: the processor's, plus what CUDA events say that a launch took on the GPU.

    On the GPU a timed function advances the clock itself and the processor's time does not count.
    """

    def __init__(self):
        self.gpu = 0.0

    def __call__(self) -> float:
        return self.gpu if device() == "cuda" else time.perf_counter()

    def timed(self, function: Callable) -> Callable:
        """function, so wrapped on the GPU that each call runs with a cold second-level cache and advances the clock.

        The GPU is kept busy for HOST_CYCLES while Python prepares the launch. The events' own two microseconds are in
        the figure: small kernels are timed in a graph of many launches, by bench/gpu/op_table.py.
        """
        if device() != "cuda":
            return function
        spoil = torch.zeros(torch.cuda.get_device_properties(0).L2_cache_size // 2, device="cuda")  # twice the cache
        most = torch.empty((), device="cuda")

        def call():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.amax(spoil, dim=0, out=most)  # read, not written: no lines are left to be evicted meanwhile
            torch.cuda._sleep(HOST_CYCLES)
            start.record()
            function()
            end.record()
            end.synchronize()
            self.gpu += start.elapsed_time(end) / 1e3

        return call


HOST_CYCLES = 1_000_000  # half a millisecond: autograd's way through a graph takes no longer
CLOCK = Clock()


BUDGET = 300.0  # seconds, after which nothing is begun: with what was begun and the table a run ends in six minutes
PATIENCE = 4.0  # seconds that one call of a row may take
BEGUN = time.perf_counter()


class TooSlow(Exception):
    """Why something is not measured, as a sentence."""


def elapsed() -> float:
    return time.perf_counter() - BEGUN


def allowed(patience: float) -> float:
    """Seconds that a call may take, in what is left of the run. Raises TooSlow where nothing is."""
    if elapsed() >= BUDGET:
        raise TooSlow(f"not measured: the {BUDGET:.0f} s of this run are over")
    return min(patience, BUDGET - elapsed())


def bear(probe: Callable | None, parts: dict, patience: float = PATIENCE, sure: float = 0.5) -> None:
    """Raises TooSlow if a part of a call says that the call would take too long.

    probe(part) does the share parts[part] of the work, the smallest first: a larger one is asked where a smaller one
    took less than `sure` seconds, of which most may be the call's own cost or another process's.
    The estimate is a reason to leave something out; it is never a figure.
    """
    limit = allowed(patience)
    for part, share in parts.items() if probe else ():
        for _ in range(2):  # a first call may prepare something
            begin = time.perf_counter()
            probe(part)
            took = time.perf_counter() - begin
            if took / share <= limit:
                return
            if took < sure:
                break
        else:
            raise TooSlow(
                f"not measured: 1/{1 / share:.0f} of it takes {took:.2g} s, and one call may take {limit:.1f} s"
            )


def borne(probe: Callable | None, parts: dict, patience: float = PATIENCE, sure: float = 0.5) -> str:
    """The sentence of `bear`, or an empty one."""
    try:
        bear(probe, parts, patience, sure)
    except TooSlow as reason:
        return str(reason)
    return ""


def rows_of(whole: int) -> dict[int, float]:
    """{how many of `whole` rows: their share}, for `bear`."""
    return {rows: rows / whole for rows in (max(1, whole // part) for part in (512, 128, 32, 8, 2))}


def once(function: Callable) -> float:
    begin = CLOCK()
    function()
    return max(CLOCK() - begin, 1e-7)


def measure(benchmark, function: Callable, *, seconds: float = 0.4) -> float:
    """The median seconds of function, recorded in about `seconds`, or once if it takes longer."""
    function, seconds = CLOCK.timed(function), min(seconds, max(0.0, BUDGET - elapsed()))
    first = once(function)
    long = first > seconds
    for _ in range(0 if long else 2):
        first = once(function)
    iterations = 1 if device() == "cuda" else max(1, int(1e-3 / first))
    rounds = 1 if long else min(50, max(5, int(seconds / (first * iterations))))
    benchmark._timer = CLOCK
    benchmark.pedantic(function, rounds=rounds, iterations=iterations, warmup_rounds=0 if long else 1)
    return benchmark.stats.stats.median


def measure_in_turn(
    benchmark, function: Callable, other: Callable | None, *, seconds: float = 0.6
) -> tuple[float, float | None, str]:
    """(median seconds of each, a note on `other`) in about `seconds`.

    `other` runs before every round, so both meet the same machine; one that takes longer than `seconds` is measured
    once, before the rounds. Without `other` its median is None.
    """
    function, times, seconds = CLOCK.timed(function), [], min(seconds, max(0.0, BUDGET - elapsed()))
    other = CLOCK.timed(other) if other else None
    first = once(other) if other else 0.0
    mine = once(function)
    slow = first > seconds
    rounds = _rounds(function, None if slow else other, seconds, mine + (0.0 if slow else first))
    if slow:
        times.append(first)

    def before():
        if other and not slow:
            times.append(once(other))

    benchmark._timer = CLOCK
    benchmark.pedantic(function, setup=before, rounds=rounds, iterations=1)
    return benchmark.stats.stats.median, statistics.median(times) if times else None, "measured once" * slow


def _rounds(function: Callable, other: Callable | None, seconds: float, first: float) -> int:
    """How many rounds fit; `first` is what one took, cold."""
    if first > seconds / 8:  # nothing to warm up
        return max(1, int(seconds / first))
    begin = time.perf_counter()
    for _ in range(2):
        if other:
            other()
        function()
    return min(200, max(5, int(2 * seconds / (time.perf_counter() - begin))))


@dataclass
class Row:
    """One line of the closing table. `amount` is in bytes or floating-point operations, `roof` per second.

    seconds is None where it was not measured, and `note` says why.
    """

    op: str
    backend: str
    shape: str
    dtype: str
    seconds: float | None
    amount: float
    unit: str  # GB/s or TFLOP/s
    roof: float | None = None
    eager: float | None = None  # seconds of the same in eager torch, in this run
    note: str = ""

    @property
    def rate(self) -> float | None:
        return self.seconds and self.amount / self.seconds / (1e9 if self.unit == "GB/s" else 1e12)

    @property
    def percent(self) -> float | None:
        return 100 * self.amount / self.seconds / self.roof if self.roof and self.seconds else None

    @property
    def ratio(self) -> float | None:
        return self.eager / self.seconds if self.eager and self.seconds else None

    @property
    def line(self) -> tuple[str, ...]:
        names = (self.op, self.backend, self.shape, self.dtype)
        if self.seconds is None:
            return (*names, "", "", "", "")
        median = f"{self.seconds * 1e3:.3f} ms" if self.seconds >= 1e-3 else f"{self.seconds * 1e6:.1f} us"
        rate = f"{self.rate:.1f} {self.unit}" if self.unit == "GB/s" else f"{self.rate:.3f} {self.unit}"
        roof = "" if self.percent is None else f"{self.percent:.0f} %"
        return (*names, median, rate, roof, "" if self.ratio is None else f"{self.ratio:.2f}")

    def info(self) -> dict:
        """For the JSON record."""
        found = {"op": self.op, "backend": self.backend, "shape": self.shape, "dtype": self.dtype}
        if self.note:
            found["note"] = self.note
        if self.seconds is not None:
            found[self.unit] = round(self.rate, 3)
        if self.percent is not None:
            found["percent_of_copy" if self.unit == "GB/s" else "percent_of_matmul"] = round(self.percent, 1)
        if self.ratio is not None:
            found |= {"eager_seconds": self.eager, "times_eager": round(self.ratio, 3)}
        return found


ROWS: list[Row] = []


def add_row(benchmark, row: Row) -> None:
    benchmark.extra_info.update(row.info())
    ROWS.append(row)


def name_of(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]


def table() -> list[str]:
    """The rows as aligned text; the ratio says how many times faster than eager."""
    lines = [("op", "backend", "shape", "dtype", "median", "rate", "of roof", "eager / it")]
    lines += [row.line for row in ROWS]
    widths = [max(len(line[i]) for line in lines) for i in range(8)]
    aligned = [[*map(str.ljust, line[:4], widths), *map(str.rjust, line[4:], widths[4:])] for line in lines]
    notes = ["", *(row.note for row in ROWS)]
    return ["  ".join([*line, note]).rstrip() for line, note in zip(aligned, notes, strict=True)]
