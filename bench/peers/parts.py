"""Where the time of one pass goes: our network's ops by kind, and the rest.

    python bench/peers/parts.py --json parts.json
    python bench/peers/parts.py --work vae --dtype bfloat16 --size 64 --batch 1

Every op's time is taken around its call; what the ops call of each other counts once. The rest is the pass without
ops: what PyTorch does, and Python. Of several passes the one with the median time is shown. Operations are counted as
a direct convolution's; the peak is the processor's multiply-adds in that dtype, measured by a loop of them.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

BENCH = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(BENCH.parent), str(BENCH), str(BENCH / "peers")]

import torch  # noqa: E402
import worker  # noqa: E402
from roofs import roof  # noqa: E402

from ldmfast.files import write_text  # noqa: E402
from ldmfast.ops.registry import OPS  # noqa: E402

NORMS = ("group_norm_silu", "group_norm_affine", "layer_norm")


def kind(name: str, args: tuple) -> str:
    if name == "conv2d":
        return f"convolution {args[1].shape[2]}x{args[1].shape[3]}"
    if name == "attention":
        return "self-attention" if args[0].shape[1] == args[1].shape[1] else "cross-attention"
    return "norms" if name in NORMS else name


def operations(name: str, args: tuple, out) -> int:
    """Multiplications and additions of a product; 0 for what is bound by memory."""
    if name == "conv2d":
        N, _, H, W = out.shape
        return 2 * N * H * W * args[1].numel()
    if name == "linear":
        return 2 * args[0].shape[:-1].numel() * args[1].numel()
    if name == "attention":
        N, L, H, D = args[0].shape
        return 4 * N * L * args[1].shape[1] * H * D
    return 0


class Watch:
    """Context in which the ops' own times are added up in `parts`: {kind: [calls, seconds, operations]}."""

    def __init__(self):
        self.parts: dict[str, list] = {}
        self.inner = [0.0]  # seconds of the ops called by the op that runs, innermost last

    def __enter__(self):
        for name, op in OPS.items():
            op.run = self.watched(name, op.run)
        return self

    def __exit__(self, *exc):
        for op in OPS.values():
            del op.run

    def watched(self, name: str, run: Callable) -> Callable:
        def call(*args):
            self.inner.append(0.0)
            begin = time.perf_counter()
            out = run(*args)
            took = time.perf_counter() - begin
            mine = took - self.inner.pop()
            self.inner[-1] += took
            part = self.parts.setdefault(kind(name, args), [0, 0.0, 0])
            part[0], part[1], part[2] = part[0] + 1, part[1] + mine, part[2] + operations(name, args, out)
            return out

        return call


def passed(run: Callable) -> tuple[float, dict[str, list]]:
    """(seconds of a pass, its parts)"""
    with Watch() as watch:
        begin = time.perf_counter()
        run()
        whole = time.perf_counter() - begin
    return whole, watch.parts


def record(whole: float, parts: dict[str, list], peak: float) -> list[dict]:
    """The parts, longest first, and the rest. peak: operations a second."""
    rows = []
    for name, (calls, seconds, amount) in sorted(parts.items(), key=lambda item: -item[1][1]):
        row = {"part": name, "calls": calls, "seconds": round(seconds, 6)}
        if amount:
            rate = amount / seconds
            row |= {"gflop": round(amount / 1e9, 3), "gflops": round(rate / 1e9, 1)}
            row["percent_of_peak"] = round(100 * rate / peak, 1)
        rows.append(row)
    rest = whole - sum(seconds for _, seconds, _ in parts.values())
    return [*rows, {"part": "rest", "calls": 1, "seconds": round(max(rest, 0.0), 6)}]


@torch.inference_mode()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", default="unet", choices=["unet", "sdxl", "vae"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--size", type=int, default=64, help="side of the latents")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    from conftest import machine  # here, since tests/ has a conftest, too

    dtype = getattr(torch, options.dtype)
    peak = roof.multiply_adds(dtype, 0.5)
    run = worker.prepared(worker.ldmfast, options.work, options.dtype, options.size, options.batch, cache="")
    run()
    passes = sorted((passed(run) for _ in range(options.rounds)), key=lambda found: found[0])
    whole, parts = passes[len(passes) // 2]
    shape = {name: getattr(options, name) for name in ("work", "dtype", "size", "batch")}
    found = {"what": "parts", "machine": machine(), **shape, "total_s": round(whole, 6)}
    found |= {"passes_s": [round(took, 4) for took, _ in passes], "peak_gflops": round(peak / 1e9, 1)}
    found["parts"] = record(whole, parts, peak)
    for row in found["parts"]:
        rate = f"{row['gflops']:8.1f} GFLOP/s {row['percent_of_peak']:6.1f} %" if "gflops" in row else ""
        print(f"{row['part']:20} {row['calls']:5} {1e3 * row['seconds']:10.2f} ms {rate}")
    print(f"{options.work} {options.dtype}: {whole:.3f} s")
    if options.json:
        write_text(options.json, json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
