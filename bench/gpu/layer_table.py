"""TFLOP/s of every convolution and linear layer of SD1.5's U-Net and decoder: cuDNN as it guesses and as it measures.

    python bench/gpu/layer_table.py --json layers_gpu.json

For each shape, at a batch of two: `guessed`, cuDNN's heuristic choice; `measured`, torch.backends.cudnn.benchmark;
`ours`, what ldmfast's op of that name chooses. Four fifths of a step are in these layers.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

BENCH = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(BENCH.parent), str(BENCH), str(BENCH / "gpu")]

import clocks  # noqa: E402
import torch  # noqa: E402
from record import LOST, DeviceLost, Record  # noqa: E402
from roofs import shapes  # noqa: E402

from ldmfast import ops  # noqa: E402
from ldmfast.commands.measuring import clock  # noqa: E402

BATCH = 2


def batched(layer, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, ...]:
    """The layer's tensors on the device, a batch of BATCH, weights in channels_last as its input is."""
    x, weight, bias = (tensor.to(device) for tensor in layer.tensors(dtype))
    x = torch.cat([x] * BATCH)  # [2, C, H, W] or [2 M, K]
    if x.dim() == 4:
        x, weight = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, weight))
    return x, weight, bias


def calls(layer, tensors) -> dict[str, Callable]:
    function = getattr(ops, layer.op)
    found = {"guessed": lambda: layer.eager(*tensors), "ours": lambda: function(*tensors, **layer.named())}
    return found | ({"measured": found["guessed"]} if layer.op == "conv2d" else {})


def figures(layer, dtype: torch.dtype, device, seconds: float) -> dict:
    tensors, found = batched(layer, dtype, device.kind), {}
    for name, call in calls(layer, tensors).items():
        torch.backends.cudnn.benchmark = name == "measured"
        took = clock.per_call(device, [call], seconds)
        found |= {
            f"{name}_us": round(1e6 * took, 3),
            f"{name}_tflops": round(BATCH * layer.operations / took / 1e12, 3),
        }
    torch.backends.cudnn.benchmark = False
    return found


@torch.inference_mode()
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--dtype", default="float16", choices=["float16", "bfloat16", "float32"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=0.05, help="of measuring, a shape and way")
    parser.add_argument("--tiny", action="store_true", help="a few small shapes")
    parser.add_argument("--resume", action="store_true", help="keep the rows that the JSON has")
    options = parser.parse_args(argv)
    device, dtype = clock.device(options.device), getattr(torch, options.dtype)
    record = Record(options.json, {"what": "gpu layers", **device.about(), "dtype": options.dtype}, options.resume)
    try:
        with clocks.watched(record, device.kind == "cuda"):
            listed = shapes.small() if options.tiny else (*shapes.unet(), *shapes.decoder())
            for layer in (each for each in listed if each.op != "attention"):  # op_table.py has that
                about = {"op": layer.op, "gflop": round(BATCH * layer.operations / 1e9, 4)}
                record.measure(layer.label, lambda layer=layer: figures(layer, dtype, device, options.seconds), **about)
    except DeviceLost:
        return LOST
    return record.status


if __name__ == "__main__":
    sys.exit(main())
