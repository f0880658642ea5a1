"""The SD1.5-size U-Net, one 64x64 sample (two on a GPU): ours and stock diffusers eager, in turn.

pytest bench/bench_unet.py --benchmark-only
Each has weights of its own, stock as diffusers makes them; a round runs stock, then ours, and medians are compared.
"""

from __future__ import annotations

import copy
import statistics
import time

import networks
import pytest
import torch
from timing import CLOCK, Row, add_row, device, name_of

from ldmfast.models.unet import UNet

DTYPES = (torch.float16, torch.bfloat16) if device() == "cuda" else (torch.bfloat16, torch.float32)
BATCH = 2 if device() == "cuda" else 1


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@torch.inference_mode()
def test_unet(benchmark, dtype):
    stock = networks.sd15(dtype, device())
    ours = UNet.from_unet(copy.deepcopy(stock))
    arguments = networks.inputs(BATCH, dtype, device())
    seconds, eager = in_turn(benchmark, lambda: ours(**arguments), lambda: stock(**arguments))
    amount, shape = networks.GFLOP * 1e9 * BATCH, f"SD1.5 {BATCH}x64x64"
    add_row(benchmark, Row("unet", "diffusers", shape, name_of(dtype), eager, amount, "TFLOP/s"))
    add_row(benchmark, Row("unet", "ldmfast", shape, name_of(dtype), seconds, amount, "TFLOP/s", eager=eager))


def in_turn(benchmark, function, other, seconds: float = 45) -> tuple[float, float]:
    """Median seconds of each in about `seconds`; `other` runs before every round, so both meet the same machine."""
    function, other, times = CLOCK.timed(function), CLOCK.timed(other), []

    def before():
        begin = CLOCK()
        other()
        times.append(CLOCK() - begin)

    begin = time.perf_counter()
    other()
    function()
    rounds = max(3, min(20, int(seconds / (time.perf_counter() - begin)) - 1))
    benchmark._timer = CLOCK
    benchmark.pedantic(function, setup=before, rounds=rounds, iterations=1)
    return benchmark.stats.stats.median, statistics.median(times)
