"""A small network as a graph: its inputs, its calls with the graph and without."""

from __future__ import annotations

import tiny
import torch
from peft import LoraConfig

from ldmfast import UNet

LAYERS = ("to_q", "to_v", "ff.net.0.proj", "conv1", "time_emb_proj")


SMALL = {
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}


def network(place):
    device, capture = place
    return UNet.from_unet(tiny.unet(**SMALL).to(device)).graph(capture=capture)


def inputs(u, **named):
    found = tiny.inputs(u, size=(8, 8), **named)
    return {k: v.to(u.device) if isinstance(v, torch.Tensor) else v for k, v in found.items()}


@torch.no_grad()
def call(u, a):
    return u(**a).sample


@torch.no_grad()
def eager(u, a):
    graphs, u._graphs = u._graphs, None
    try:
        return u(**a).sample
    finally:
        u._graphs = graphs


def settle(u, a):
    """Call it until it is replayed."""
    for _ in range(4):
        before = u.graphs.replays
        y = call(u, a)
        if u.graphs.replays > before:
            assert torch.equal(y, eager(u, a))
            return y
    raise AssertionError(u.explain())


def add_lora(u, alpha=4):
    u.add_adapter(LoraConfig(r=2, lora_alpha=alpha, init_lora_weights=False, target_modules=list(LAYERS)), "one")
