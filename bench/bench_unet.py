"""The SD1.5-size U-Net, one 64x64 sample (two on a GPU): ours and stock diffusers eager, in turn.

pytest bench/bench_unet.py --benchmark-only
Each has weights of its own, stock as diffusers makes them; a round runs stock, then ours, and medians are compared.
A first pass of stock that takes longer than PATIENCE (bfloat16 on a processor without it) is cut short.
"""

from __future__ import annotations

import copy
import time

import networks
import pytest
import torch
from timing import BUDGET, Row, TooSlow, add_row, bear, device, elapsed, measure_in_turn, name_of

from ldmfast.models.unet import UNet

DTYPES = (torch.float16, torch.bfloat16) if device() == "cuda" else (torch.bfloat16, torch.float32)
PATIENCE, SECONDS = 20, 30  # of one pass, of all of a dtype's
BATCH = 2 if device() == "cuda" else 1


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@torch.inference_mode()
def test_unet(benchmark, dtype):
    stock = networks.sd15(dtype, device())
    ours = UNet.from_unet(copy.deepcopy(stock))
    arguments = networks.inputs(BATCH, dtype, device())
    amount, shape = networks.GFLOP * 1e9 * BATCH, f"SD1.5 {BATCH}x64x64"
    note = passed(stock, arguments)
    try:
        parts = {16: 1 / 16, 32: 1 / 4}
        bear(lambda size: ours(**networks.inputs(BATCH, dtype, device(), size=size)), parts, 2 * PATIENCE, sure=4)
    except TooSlow as reason:
        add_row(benchmark, Row("unet", "ldmfast", shape, name_of(dtype), None, amount, "TFLOP/s", note=str(reason)))
        pytest.skip(str(reason))
    seconds, eager, once = measure_in_turn(
        benchmark, lambda: ours(**arguments), None if note else lambda: stock(**arguments), seconds=SECONDS
    )
    add_row(benchmark, Row("unet", "diffusers", shape, name_of(dtype), eager, amount, "TFLOP/s", note=note or once))
    add_row(benchmark, Row("unet", "ldmfast", shape, name_of(dtype), seconds, amount, "TFLOP/s", eager=eager))


def passed(model, arguments) -> str:
    """Why a pass of the model is not to be waited for, or an empty string: it is cut short between two layers."""
    limit = min(PATIENCE, max(0.0, BUDGET - elapsed()))
    begin, layers, done = time.perf_counter(), [m for m in model.modules() if not [*m.children()]], 0

    def look(module, given):
        nonlocal done
        done += 1
        if (took := time.perf_counter() - begin) > limit:
            raise TooSlow(f"not measured: cut short in layer {done} of {len(layers)}, after {took:.0f} s")

    hooks = [layer.register_forward_pre_hook(look) for layer in layers]
    try:
        model(**arguments)
    except TooSlow as reason:
        return str(reason)
    finally:
        for hook in hooks:
            hook.remove()
    return ""
