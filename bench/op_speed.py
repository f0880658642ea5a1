"""The speed of try_op.py: the native rows of bench_ops.py, and a comparison with an earlier run.

A row is divided by a matrix product that is timed in turn with it, for the machine's pace changes between runs; it
counts as slower only if its milliseconds say so, too. All rows are passed over PASSES times; a row's noise is how far
its passes but the farthest lie apart, as a share of their median.

`python bench/op_speed.py OP WORDS...` runs the rows that have these words, over and over: what a profiler is given.
"""

from __future__ import annotations

import functools
import json
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
PASSES, SECONDS = 5, 0.1  # over all rows; of a row in a pass
LEAST = 0.03  # a row that is slower by less is not named
LOOP = 5.0  # seconds for a profiler


def calls(name: str, words: tuple[str, ...] = ()) -> dict:
    """{row's label: a call} of every native row of bench_ops.py that this machine runs and that has all the words."""
    import bench_ops
    from timing import CLOCK, name_of

    kinds = (
        ("forward", bench_ops.CASES, bench_ops.forward_inputs),
        ("gradient", bench_ops.BACKWARD, bench_ops.gradient_inputs),
    )
    found = {}
    for kind, cases, inputs_of in kinds:
        for case, dtype in [(mine, dtype) for mine in cases if mine.op == name for dtype in mine.dtypes]:
            labels = {b: f"{kind:<8}  {case.shape:<22}  {name_of(dtype)}  {b}" for b in bench_ops.BACKENDS}
            labels = {backend: label for backend, label in labels.items() if set(words) <= set(label.split())}
            op, inputs = inputs_of(case, dtype) if labels else (None, None)
            for backend, label in labels.items():
                if backend in op.backends and op.backends[backend].refusal(inputs) is None:
                    found[label] = CLOCK.timed(functools.partial(op.run, *inputs, backend))
    return found


def seconds_of(call, times: int = 1) -> float:
    from timing import CLOCK

    begin = CLOCK()
    for _ in range(times):
        call()
    return (CLOCK() - begin) / times


def measured(name: str) -> dict:
    """{label: [median seconds, the same in matrix products, noise]}"""
    import torch
    from timing import CLOCK, device

    size = 2048 if device() == "cuda" else 384
    a = torch.randn(size, size, device=device())
    product, rows = CLOCK.timed(lambda: torch.mm(a, a)), calls(name)
    passes = {label: [] for label in rows}
    for turn in range(PASSES):
        for label, call in rows.items():
            if turn == 0:
                call()
            passes[label].append(timed_in_turn(call, product))
    return {label: summary(found) for label, found in passes.items()}


def timed_in_turn(call, product) -> tuple[float, float]:
    """(median seconds of call, of the product), a few of the one before each of the other."""
    begin, times, paces, taken = time.perf_counter(), 1, [], []
    while not taken or time.perf_counter() - begin < SECONDS:
        paces += [seconds_of(product) for _ in range(3)]
        taken.append(seconds_of(call, times))
        if taken[0] < 1e-3 and times == 1:
            times = max(2, int(1e-3 / max(taken.pop(), 1e-7)))
    return statistics.median(taken), statistics.median(paces)


def summary(passes: list[tuple[float, float]]) -> list[float]:
    """[median seconds, median ratio, noise]; one pass, the farthest out, may be another process's doing."""
    ratios = [seconds / pace for seconds, pace in passes]
    ratio = statistics.median(ratios)
    near = sorted(ratios, key=lambda value: abs(value - ratio))[:-1]
    return [statistics.median(seconds for seconds, _ in passes), ratio, (max(near) - min(near)) / ratio]


def before(file: Path, machine: str, base: str | None) -> dict | None:
    """The last run of this machine (at the commit `base`, if one is named), or None."""
    runs = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    runs = [run for run in runs if run["machine"] == machine and (not base or run["commit"].startswith(base))]
    return runs[-1] if runs else None


def print_table(rows: dict, last: dict | None) -> list[str]:
    """The table; returns the rows that are slower than the last run by more than the noise of both."""
    slower, old = [], last["rows"] if last else {}
    width = max(map(len, rows), default=0)
    since = f"against {last['commit']} of {last['when']}" if last else "the first run on this machine"
    print(f"speed, {since}; the ratio is the lesser of milliseconds and matrix products timed in turn")
    print(f"{'milliseconds':<{width}}  {'now':>8}  {'before':>8}  ratio  noise")
    for label, (seconds, pace, noise) in rows.items():
        line = f"{label:<{width}}  {1e3 * seconds:8.3f}"
        if label in old:
            # the kinder of two readings: another process may have slowed the products of one run more than its rows
            ratio, noise = min(seconds / old[label][0], pace / old[label][1]), noise + old[label][2]
            beyond = ratio > 1 + max(LEAST, noise)
            slower += [f"{' '.join(label.split())}, {ratio:.2f}"] if beyond else []
            line += f"  {1e3 * old[label][0]:8.3f}  {ratio:5.2f}  {noise:5.2f}{'  SLOWER' if beyond else ''}"
        print(line)
    return slower


def loop(name: str, words: list[str]) -> None:
    """Runs the rows whose labels have all the words, in turn, for LOOP seconds or once."""
    import torch

    with torch.inference_mode():
        rows = calls(name, tuple(words))
        if not rows:
            raise SystemExit(f"no row of {name!r} has the words {' '.join(words)}")
        print("\n".join(rows))
        begin, done = time.monotonic(), 0
        while not done or time.monotonic() - begin < LOOP:
            for call in rows.values():
                call()
            done += 1
    print(f"{done} times each")


if __name__ == "__main__":
    loop(sys.argv[1], sys.argv[2:])
