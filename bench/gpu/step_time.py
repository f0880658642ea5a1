"""One step, ours and its rivals in one run: SD1.5, SDXL (U-Net, guidance, DDIM), the decoder, a training step.

    python bench/gpu/step_time.py --json step.json                     on a GPU: SD1.5, float16, all rows not compiled
    python bench/gpu/step_time.py --work sdxl --json sdxl.json         vae and train likewise
    python bench/gpu/step_time.py --compiled --json compiled.json      the rows of torch.compile, some minutes
    python bench/gpu/step_time.py --device cpu --dtype bfloat16        on a CPU

The rows, and what each has set: ldmfast/commands/measuring/rows.py. `--row` takes some of them. A row is the median of
a call's time by events, for some seconds after three calls; the JSON is written after every row.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent)]

import clocks  # noqa: E402
import diffusers  # noqa: E402
import torch  # noqa: E402
from record import LOST, DeviceLost, Record  # noqa: E402

from ldmfast.commands.measuring import clock, rows  # noqa: E402
from ldmfast.commands.measuring.works import Work  # noqa: E402


def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Norm of the difference over norm."""
    return ((got.double() - wanted.double()).norm() / wanted.double().norm()).item()


def figures(row, work: Work, device, seconds: float, kept: dict) -> dict:
    """The row's medians. kept["answer"]: the first row's, with which the others are compared."""
    begin = time.perf_counter()
    with rows.settings(row), torch.no_grad():
        try:
            run = rows.prepared(row, work, device)
            run()
            device.wait()
            first = time.perf_counter() - begin
            times = clock.times(device, run, seconds)
            host = clock.host_seconds(device, run, 5) if device.kind == "cuda" else None
            answer = run().clone()  # a replay's, where there is a graph
        finally:
            more = rows.released(row, work)
    found = {
        "median_ms": round(1e3 * statistics.median(times), 4),
        "min_ms": round(1e3 * min(times), 4),
        "runs": len(times),
        "first_call_s": round(first, 2),
        **more,
    }
    if host is not None:
        found["host_ms"] = round(1e3 * host, 4)  # of which a step keeps the processor busy
        found["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    if not work.trains:  # there each row has weights of its own by now
        wanted = kept.setdefault("answer", answer)
        found["difference_to_diffusers"] = error(answer, wanted)
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--work", default="sd15", choices=["sd15", "sdxl", "vae", "train"])
    parser.add_argument("--row", nargs="+", choices=sorted(rows.BY_KEY), help="these only, stock first")
    parser.add_argument("--compiled", action="store_true", help="the rows of torch.compile")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float16", choices=["float16", "bfloat16", "float32"])
    parser.add_argument("--seconds", type=float, default=4.0, help="of measuring, a row")
    parser.add_argument("--tiny", action="store_true", help="a network of a few channels")
    parser.add_argument("--resume", action="store_true", help="keep the rows that the JSON has")
    options = parser.parse_args(argv)
    if options.compiled and options.device == "cpu" and not options.tiny:
        parser.error("on a CPU bench/peers/compare.py compares with torch.compile")
    device = clock.device(options.device)
    work = Work(options.work, getattr(torch, options.dtype), options.device, options.tiny)
    about = {"what": work.what, "work": work.name, **device.about(), "dtype": options.dtype}
    record = Record(options.json, {**about, "diffusers": diffusers.__version__}, options.resume)
    wanted = [rows.BY_KEY[key] for key in options.row or ()]
    wanted = wanted or rows.rows_of(work.name, rows.COMPILED if options.compiled else rows.ROWS)
    kept = {}
    try:
        with clocks.watched(record, device.kind == "cuda"):
            for row in wanted:
                if device.kind == "cuda":
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()
                record.measure(row.name, lambda row=row: figures(row, work, device, options.seconds, kept), key=row.key)
    except DeviceLost:
        return LOST
    return record.status


if __name__ == "__main__":
    sys.exit(main())
