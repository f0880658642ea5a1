"""How many kernels a GPU is asked to start for one U-Net call and one step, counted without a GPU.

    python bench/checks/launches.py                        SD1.5, 64x64, batch 2 (guidance), float16; a quarter minute
    python bench/checks/launches.py --network sdxl --dtype float32
    python bench/checks/launches.py --most 400 --most-step 402       exits 1 where there are more

The network runs on meta tensors, which have shapes and no memory and take the way that a GPU's take (the ways of a CPU
are for CPU tensors alone). Each operation of PyTorch below autograd is one launch, a convolution's bias one more (torch
adds it in a kernel of its own); what only makes a view or allocates is none. An op of ours is as many as its launcher
makes, one where this says nothing else. Where PyTorch's own kernels need several launches for an operation, this counts
one: it is the least that can be.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import networks  # noqa: E402
import torch  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from ldmfast import DDIMScheduler, UNet  # noqa: E402

OURS = {"timestep_mlp": 2}  # launches of an op, in CUDA C++ as in Triton: its two layers; any other is one
ALLOCATES = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")


class Launches(TorchDispatchMode):
    """Counts, by op, what a GPU would be asked to start: `with Launches() as counted: ...`, then counted.by_op."""

    def __init__(self) -> None:
        super().__init__()
        self.by_op: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for name, count in launches(func, args):
            self.by_op[name] += count
        out = func(*args, **kwargs or {})
        if func is torch.ops.aten.convolution.default and any(map(_channels_last, args[:2])):
            out = out.to(memory_format=torch.channels_last)  # as cuDNN's is; a meta tensor's would be contiguous
        return out


def _channels_last(x: torch.Tensor) -> bool:
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)


def launches(func, args) -> list[tuple[str, int]]:
    """(name, launches) of one call of an operator."""
    library, _, name = func._schema.name.partition("::")
    if library == "ldmfast":
        return [(f"ldmfast.{name}", OURS.get(name, 1))]
    if name in ALLOCATES or func.is_view or func in (torch.ops.aten.detach.default, torch.ops.aten.lift_fresh.default):
        return []
    if name == "_unsafe_view" or name == "_reshape_alias":
        return []
    if name == "convolution":
        return [(name, 1), ("a convolution's bias", int(args[2] is not None))]
    return [(name, 1)]


def network(name: str, dtype: torch.dtype) -> tuple[UNet, Callable[[int], tuple[tuple, dict]]]:
    """(the network on meta tensors, what makes the arguments of a call of this batch)"""
    unet = UNet.from_unet(getattr(networks, name)(dtype, "meta"))
    side, width = unet.config.sample_size, unet.config.cross_attention_dim

    def arguments(batch):
        sample, t = torch.empty(batch, 4, side, side, dtype=dtype, device="meta"), torch.empty((), device="meta")
        named = {"return_dict": False}
        if name == "sdxl":
            text, ids = torch.empty(batch, 1280, dtype=dtype, device="meta"), torch.empty(batch, 6, device="meta")
            named["added_cond_kwargs"] = {"text_embeds": text, "time_ids": ids}
        context = torch.empty(batch, 77, width, dtype=dtype, device="meta")
        return (sample, t.long(), context), named

    return unet, arguments


@torch.no_grad()
def counted_call(name: str = "sd15", dtype: torch.dtype = torch.float16, batch: int = 2) -> Counter[str]:
    """Launches by op of one call of the network on a batch."""
    unet, arguments = network(name, dtype)
    args, named = arguments(batch)
    with Launches() as counted:
        unet(*args, **named)
    return counted.by_op


@torch.no_grad()
def counted_update(batch: int = 1, side: int = 64, dtype: torch.dtype = torch.float16) -> Counter[str]:
    """Launches by op of what a step adds to the call: the latents twice, then guidance and DDIM on a device's t."""
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False)
    scheduler.set_timesteps(50, device="meta")
    latents = torch.empty(batch, 4, side, side, dtype=dtype, device="meta")
    output = torch.empty(2 * batch, 4, side, side, dtype=dtype, device="meta")
    scheduler.step(output, scheduler.timesteps[0], latents, guidance=7.5, return_dict=False)  # tables moved: once a run
    with Launches() as counted:
        torch.cat([latents, latents])
        scheduler.step(output, scheduler.timesteps[1], latents, guidance=7.5, return_dict=False)
    return counted.by_op


def table(by_op: Counter[str], title: str) -> str:
    lines = [f"{title}: {by_op.total()}"]
    return "\n".join(lines + [f"  {count:>5}  {name}" for name, count in by_op.most_common()])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--network", choices=("sd15", "sdxl"), default="sd15")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="float16")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--most", type=int, help="exit 1 if a call makes more")
    parser.add_argument("--most-step", type=int, help="exit 1 if a step makes more")
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    call, update = counted_call(arguments.network, dtype, arguments.batch), counted_update(dtype=dtype)
    print(table(call, f"{arguments.network}, batch {arguments.batch}, {arguments.dtype}: launches of a U-Net call"))
    print(table(update, "what a step adds"))
    step = call.total() + update.total()
    print(f"a step in all: {step}")
    over = (arguments.most and call.total() > arguments.most) or (arguments.most_step and step > arguments.most_step)
    return int(bool(over))


if __name__ == "__main__":
    sys.exit(main())
