"""One sampling step as a program takes it: guidance and `DDIMScheduler.step`, diffusers' own against ours.

`bench_ops.py` times the op against bare tensor maths; here both sides look up their alphas and check their arguments.
"""

from __future__ import annotations

import diffusers
import pytest
import torch
from timing import Row, add_row, device, measure_in_turn, name_of

from ldmfast import DDIMScheduler

GUIDANCE = 7.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=name_of)
@pytest.mark.parametrize("batch", [1, 8])
@torch.inference_mode()
def test_guided_step(benchmark, batch, dtype):
    torch.manual_seed(0)
    stock, ours = diffusers.DDIMScheduler(), DDIMScheduler()
    stock.set_timesteps(50)
    ours.set_timesteps(50)
    sample = torch.randn(batch, 4, 64, 64, dtype=dtype, device=device())
    output = torch.randn(2 * batch, 4, 64, 64, dtype=dtype, device=device())
    t = stock.timesteps[20]

    def eager():
        uncond, cond = output.chunk(2)
        return stock.step(uncond + GUIDANCE * (cond - uncond), t, sample)

    seconds, before, _ = measure_in_turn(benchmark, lambda: ours.step(output, t, sample, guidance=GUIDANCE), eager)
    amount, shape = 5 * sample.numel() * dtype.itemsize, f"{batch}x4x64x64 guided"
    add_row(benchmark, Row("DDIMScheduler", "diffusers", shape, name_of(dtype), before, amount, "GB/s"))
    add_row(benchmark, Row("DDIMScheduler", "ldmfast", shape, name_of(dtype), seconds, amount, "GB/s", eager=before))
