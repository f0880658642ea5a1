"""What the benchmarks share: the clock, the rows of the closing table, and the roofs that they are compared with.

A run measures one device: the GPU where there is one, else the CPU (LDMFAST_BENCH_DEVICE=cpu|cuda decides otherwise).
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
        """function, so wrapped on the GPU that each call runs with a cold second-level cache and advances the clock."""
        if device() != "cuda":
            return function
        spoil = torch.empty(2 * torch.cuda.get_device_properties(0).L2_cache_size, dtype=torch.uint8, device="cuda")

        def call():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            spoil.zero_()  # also keeps the GPU busy while the launch is prepared
            start.record()
            function()
            end.record()
            end.synchronize()
            self.gpu += start.elapsed_time(end) / 1e3

        return call


CLOCK = Clock()


def measure(benchmark, function: Callable, *, seconds: float = 0.4) -> float:
    """The median seconds of function, recorded by the benchmark fixture in about `seconds`."""
    function = CLOCK.timed(function)
    for _ in range(2):
        function()
    begin = CLOCK()
    function()
    once = max(CLOCK() - begin, 1e-7)
    iterations = 1 if device() == "cuda" else max(1, int(1e-3 / once))
    rounds = min(50, max(5, int(seconds / (once * iterations))))
    benchmark._timer = CLOCK
    benchmark.pedantic(function, rounds=rounds, iterations=iterations, warmup_rounds=1)
    return benchmark.stats.stats.median


def measure_in_turn(benchmark, function: Callable, other: Callable, *, seconds: float = 0.6) -> tuple[float, float]:
    """Median seconds of each in about `seconds`; `other` runs before every round, so both meet the same machine."""
    function, other, times = CLOCK.timed(function), CLOCK.timed(other), []

    def before():
        begin = CLOCK()
        other()
        times.append(CLOCK() - begin)

    for _ in range(2):
        other()
        function()
    begin = time.perf_counter()
    other()
    function()
    rounds = min(200, max(5, int(seconds / (time.perf_counter() - begin))))
    benchmark._timer = CLOCK
    benchmark.pedantic(function, setup=before, rounds=rounds, iterations=1)
    return benchmark.stats.stats.median, statistics.median(times)


@dataclass
class Row:
    """One line of the closing table. `amount` is in bytes or floating-point operations, `roof` per second."""

    op: str
    backend: str
    shape: str
    dtype: str
    seconds: float
    amount: float
    unit: str  # GB/s or TFLOP/s
    roof: float | None = None
    eager: float | None = None  # seconds of the same in eager torch, in this run

    @property
    def rate(self) -> float:
        return self.amount / self.seconds / (1e9 if self.unit == "GB/s" else 1e12)

    @property
    def percent(self) -> float | None:
        return 100 * self.amount / self.seconds / self.roof if self.roof else None

    @property
    def ratio(self) -> float | None:
        return self.eager / self.seconds if self.eager else None

    def info(self) -> dict:
        """For the JSON record."""
        found = {
            "op": self.op,
            "backend": self.backend,
            "shape": self.shape,
            "dtype": self.dtype,
            self.unit: round(self.rate, 3),
        }
        if self.roof:
            found["percent_of_copy" if self.unit == "GB/s" else "percent_of_matmul"] = round(self.percent, 1)
        if self.eager:
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
    for row in ROWS:
        median = f"{row.seconds * 1e3:.3f} ms" if row.seconds >= 1e-3 else f"{row.seconds * 1e6:.1f} us"
        rate = f"{row.rate:.1f} {row.unit}" if row.unit == "GB/s" else f"{row.rate:.3f} {row.unit}"
        roof = "" if row.percent is None else f"{row.percent:.0f} %"
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        lines.append((row.op, row.backend, row.shape, row.dtype, median, rate, roof, ratio))
    widths = [max(len(line[i]) for line in lines) for i in range(8)]
    aligned = [[*map(str.ljust, line[:4], widths), *map(str.rjust, line[4:], widths[4:])] for line in lines]
    return ["  ".join(line) for line in aligned]
