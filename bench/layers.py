"""Every convolution, linear layer and attention of SD1.5, SDXL and the decoder: ours, eager, oneDNN prepacked.

    python bench/layers.py --json layers.json            some minutes on two cores
    python bench/layers.py --small                       a few small shapes, some seconds
    python bench/layers.py --only unet 3x3 bfloat16      the rows that have all these words

Ours is the op as its users call it, with the backend that it chooses for the shape; where that is not the CPU kernel,
the kernel has a column of its own. All take turns; a row has their medians in ms, and a ratio is the median of the
turns' ratios, which a processor that is slower for a while changes less. Prepacked is what torch.compile's freezing
calls: the weight in oneDNN's own layout, made once, outside the time. It has none for a dtype that the processor lacks,
nor for attention: the column is empty then. The share is of the processor's multiply-adds in that dtype, measured first
by a loop of them (roofs/roof.py). Operations are counted as a direct convolution's, so that Winograd's forms, which
make fewer, may pass 100 %. The JSON is written after every row; at the end stands the share of each class of layers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import torch  # noqa: E402
from roofs import roof, shapes  # noqa: E402

from ldmfast import files, ops  # noqa: E402
from ldmfast.ops.registry import OPS  # noqa: E402


def turns(calls: dict[str, Callable], seconds: float) -> dict[str, list[float]]:
    """Seconds of every call: they take turns for about `seconds`, five times at least."""
    times = {name: [] for name in calls}
    for call in calls.values():
        call()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or any(len(found) < 5 for found in times.values()):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - begin)
    return times


def packs(dtype) -> bool:
    """Whether oneDNN has this dtype on this processor."""
    supported = torch.ops.mkldnn
    if dtype is torch.bfloat16:
        return supported._is_mkldnn_bf16_supported()
    return dtype is torch.float32 or supported._is_mkldnn_fp16_supported()


def measured(layer, dtype, seconds: float) -> tuple[str, dict[str, list[float]]]:
    """The backend that the op chooses, and the seconds of every turn of each call."""
    torch.manual_seed(0)
    tensors, named = layer.tensors(dtype), layer.named()
    function = getattr(ops, layer.op)
    chosen = OPS[layer.op].select(OPS[layer.op].normalise(*tensors, **named)).name
    calls = {"ours": lambda: function(*tensors, **named), "eager": lambda: layer.eager(*tensors)}
    if chosen != "cpu":
        calls["cpu"] = lambda: function(*tensors, **named, backend="cpu")
    if layer.packed and packs(dtype):
        calls["packed"] = layer.packed(*tensors)
    wanted = calls["eager"]()
    for call in calls.values():  # all compute the same
        torch.testing.assert_close(call(), wanted, rtol=0.1, atol=0.1)
    return chosen, turns(calls, seconds)


def times(than: list[float], ours: list[float]) -> float:
    """How many times the speed of another call ours has."""
    return round(statistics.median(a / b for a, b in zip(than, ours, strict=True)), 3)


def row(layer, dtype, peak: float, seconds: float) -> dict:
    chosen, found = measured(layer, dtype, seconds)
    medians = {name: statistics.median(turn) for name, turn in found.items()}
    rate = layer.operations / medians["ours"]
    others = [name for name in ("eager", "packed", "cpu") if name in found]
    return {
        "layer": layer.label,
        "class": layer.kind,
        "dtype": str(dtype).removeprefix("torch."),
        **{f"{name}_ms": round(1e3 * value, 4) for name, value in medians.items()},
        "gflops": round(rate / 1e9, 1),
        "percent_of_peak": round(100 * rate / peak, 1),
        **{f"times_{name}": times(found[name], found["ours"]) for name in others},
        "chosen": chosen,
    }


def classes(rows: list[dict]) -> list[dict]:
    """Of each class and dtype: how many rows, the share of the peak and the ratio to eager of all of them together."""
    found = []
    for kind, dtype in dict.fromkeys((row["class"], row["dtype"]) for row in rows):
        mine = [row for row in rows if (row["class"], row["dtype"]) == (kind, dtype)]
        ours, eager = (sum(row[f"{name}_ms"] for row in mine) for name in ("ours", "eager"))
        share = sum(row["percent_of_peak"] * row["ours_ms"] for row in mine) / ours
        packed = min((row["times_packed"] for row in mine if "times_packed" in row), default=None)
        found.append(
            {
                "class": kind,
                "dtype": dtype,
                "rows": len(mine),
                "percent_of_peak": round(share, 1),
                "times_eager": round(eager / ours, 3),
                "least_times_packed": packed,
            }
        )
    return found


def print_row(row: dict) -> None:
    ratios = f"{row['times_eager']:8.2f} {row.get('times_packed', float('nan')):8.2f}"
    rates = f"{row['ours_ms']:9.3f} {row['gflops']:8.1f} {row['percent_of_peak']:7.1f}%"
    chosen = row["chosen"] + (f"  (the kernel: {row['cpu_ms']:.3f} ms)" if "cpu_ms" in row else "")
    print(f"{row['layer'] + ' ' + row['dtype']:52} {rates} {ratios}  {chosen}", flush=True)


@torch.inference_mode()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument(
        "--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16", "float16"]
    )
    parser.add_argument("--seconds", type=float, default=1.0, help="of measuring, a row")
    parser.add_argument("--small", action="store_true", help="a few small shapes instead")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="rows that have all these words")
    options = parser.parse_args()
    from conftest import machine  # here, since tests/ has a conftest, too

    layers = [*shapes.small()] if options.small else [*shapes.unet(), *shapes.sdxl(), *shapes.decoder()]
    found = {"machine": machine(), "peak_gflops": {}, "rows": [], "classes": []}
    print(f"{'':52} {'ours ms':>9} {'GFLOP/s':>8} {'of peak':>8} {'x eager':>8} {'x packed':>8}  chosen")
    for name in options.dtype:
        dtype = getattr(torch, name)
        wanted = [layer for layer in layers if all(word in f"{layer.label} {name}".split() for word in options.only)]
        peak = roof.multiply_adds(dtype, options.seconds) if wanted else 0.0
        found["peak_gflops"][name] = round(peak / 1e9, 1)
        for layer in wanted:
            now = row(layer, dtype, peak, options.seconds)
            found["rows"].append(now)
            print_row(now)
            found["classes"] = classes(found["rows"])
            if options.json:
                files.write_text(options.json, json.dumps(found, indent=2) + "\n")
    for each in found["classes"]:
        figures = f"{each['percent_of_peak']:7.1f}%  {each['times_eager']:8.2f}"
        print(f"{each['class'] + ' ' + each['dtype']:52} {each['rows']:4} rows {figures}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
