"""The SD1.5-size U-Net, one 64x64 sample (two on a GPU): ours and stock diffusers eager, in turn.

pytest bench/bench_unet.py --benchmark-only
Each has weights of its own, stock as diffusers makes them; a round runs stock, then ours, and medians are compared.
Where one pass takes longer than all rounds should (stock in bfloat16 on a processor without it), there is one round.
"""

from __future__ import annotations

import copy
import statistics

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
    if device() == "cuda":  # so that kernels are chosen; on a CPU there is nothing to warm up
        stock(**arguments), ours(**arguments)
    seconds, eager = in_turn(benchmark, lambda: ours(**arguments), lambda: stock(**arguments))
    amount, shape = networks.GFLOP * 1e9 * BATCH, f"SD1.5 {BATCH}x64x64"
    add_row(benchmark, Row("unet", "diffusers", shape, name_of(dtype), eager, amount, "TFLOP/s"))
    add_row(benchmark, Row("unet", "ldmfast", shape, name_of(dtype), seconds, amount, "TFLOP/s", eager=eager))


def in_turn(benchmark, function, other, seconds: float = 45) -> tuple[float, float]:
    """Median seconds of each in about `seconds`; `other` runs before every round, so both meet the same machine."""
    function, other = CLOCK.timed(function), CLOCK.timed(other)

    def run_other():
        begin = CLOCK()
        other()
        return CLOCK() - begin

    times, begun = [run_other()], []
    rounds = max(1, min(20, int(seconds / (2 * times[0]))))

    def before():  # the first round's has been run
        if begun:
            times.append(run_other())
        begun.append(True)

    benchmark._timer = CLOCK
    benchmark.pedantic(function, setup=before, rounds=rounds, iterations=1)
    return benchmark.stats.stats.median, statistics.median(times)
