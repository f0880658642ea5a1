"""Every convolution and linear layer of the SD1.5 U-Net at 64x64 and of its decoder: ours, eager, oneDNN prepacked.

    python bench/layers.py --json layers.json            some minutes on two cores
    python bench/layers.py --small                       a few small shapes, some seconds
    python bench/layers.py --only unet 3x3 bfloat16      the rows that have all these words

The three take turns; a row has their medians in ms. Prepacked is what torch.compile's freezing calls: the weight in
oneDNN's own layout, made once, outside the time. It has none for a dtype that the processor lacks: the column is empty
then. The share is of the fastest product of two square matrices in that dtype, measured first. Operations are counted
as a direct convolution's, so that Winograd's forms, which make fewer, pass 100 %. The JSON is written after every row.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from ldmfast import ops  # noqa: E402
from ldmfast.ops.registry import OPS  # noqa: E402


@dataclass(frozen=True)
class Convolution:
    where: str
    Ci: int
    Co: int
    side: int  # of the input
    k: int = 3
    stride: int = 1
    upsample: int = 1

    op = "conv2d"

    @property
    def label(self) -> str:
        more = f" stride {self.stride}" * (self.stride > 1) + " enlarged" * (self.upsample > 1)
        return f"{self.where} {self.k}x{self.k} {self.Ci}->{self.Co} at {self.side}x{self.side}{more}"

    @property
    def operations(self) -> int:
        out = self.side * self.upsample // self.stride
        return 2 * out * out * self.Ci * self.Co * self.k**2

    def tensors(self, dtype):
        weight = torch.randn(self.Co, self.Ci, self.k, self.k) * (self.Ci * self.k**2) ** -0.5
        x = torch.randn(1, self.Ci, self.side, self.side).contiguous(memory_format=torch.channels_last)
        return x.to(dtype), weight.to(dtype), torch.randn(self.Co).to(dtype)

    def named(self) -> dict:
        return {"stride": self.stride, "padding": self.k // 2, "upsample": self.upsample}

    def enlarged(self, x):
        return x if self.upsample == 1 else F.interpolate(x, scale_factor=2.0, mode="nearest")

    def eager(self, x, weight, bias):
        return F.conv2d(self.enlarged(x), weight, bias, self.stride, self.k // 2)

    def packed(self, x, weight, bias):
        numbers = [self.k // 2] * 2, [self.stride] * 2, [1, 1], 1
        size = self.enlarged(x).shape
        kept = torch._C._nn.mkldnn_reorder_conv2d_weight(weight.to_mkldnn(), *numbers, size)
        run = torch.ops.mkldnn._convolution_pointwise
        return lambda: run(self.enlarged(x), kept, bias, *numbers, "none", [], "")


@dataclass(frozen=True)
class Linear:
    where: str
    M: int
    K: int
    N: int

    op = "linear"

    @property
    def label(self) -> str:
        return f"{self.where} linear {self.M}x{self.K}->{self.N}"

    @property
    def operations(self) -> int:
        return 2 * self.M * self.K * self.N

    def tensors(self, dtype):
        weight = torch.randn(self.N, self.K) * self.K**-0.5
        return torch.randn(self.M, self.K).to(dtype), weight.to(dtype), torch.randn(self.N).to(dtype)

    def named(self) -> dict:
        return {}

    def eager(self, x, weight, bias):
        return F.linear(x, weight, bias)

    def packed(self, x, weight, bias):
        kept = torch.ops.mkldnn._reorder_linear_weight(weight, self.M)
        return lambda: torch.ops.mkldnn._linear_pointwise(x, kept, bias, "none", [], "")


def unet() -> Iterator[Convolution | Linear]:
    """SD1.5's U-Net, one 64x64 sample, each shape once."""
    levels = ((320, 64), (640, 32), (1280, 16), (1280, 8))
    blocks = {64: (320, 640, 960), 32: (320, 640, 960, 1280, 1920), 16: (640, 1280, 1920, 2560), 8: (1280, 2560)}
    yield Convolution("unet", 4, 320, 64)
    for width, side in levels:
        for Ci in blocks[side]:
            yield Convolution("unet", Ci, width, side)
            if Ci != width:
                yield Convolution("unet", Ci, width, side, k=1)
        yield Convolution("unet", width, width, side, k=1)  # into and out of a transformer
        if side > 8:
            yield Convolution("unet", width, width, side, stride=2)
        if side < 64:
            yield Convolution("unet", width, width, side, upsample=2)
        for K, N in ((width, width), (width, 8 * width), (4 * width, width)):
            yield Linear("unet", side * side, K, N)
    yield Convolution("unet", 320, 4, 64)
    for width in (320, 640, 1280):
        yield Linear("unet", 77, 768, width)  # keys and values of the prompt
        yield Linear("unet", 1, 1280, width)  # the time of a residual block
    yield Linear("unet", 1, 320, 1280)


def decoder() -> Iterator[Convolution | Linear]:
    """The autoencoder's decoder to 512x512, each shape once."""
    yield Convolution("decoder", 4, 4, 64, k=1)
    yield Convolution("decoder", 4, 512, 64)
    yield Linear("decoder", 64 * 64, 512, 512)
    for Ci, Co, side in ((512, 512, 64), (512, 512, 128), (512, 256, 256), (256, 128, 512)):
        yield Convolution("decoder", Ci, Co, side)
        if Ci != Co:
            yield Convolution("decoder", Co, Co, side)
            yield Convolution("decoder", Ci, Co, side, k=1)
        if side < 512:
            yield Convolution("decoder", Co, Co, side, upsample=2)
    yield Convolution("decoder", 128, 3, 512)


def small() -> Iterator[Convolution | Linear]:
    yield Convolution("small", 64, 64, 16)
    yield Convolution("small", 64, 32, 8, k=1)
    yield Convolution("small", 32, 32, 8, upsample=2)
    yield Linear("small", 64, 64, 128)


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


def peak(dtype, size: int, seconds: float) -> float:
    """Operations a second of the fastest product of two square matrices."""
    a, b = torch.randn(2, size, size).to(dtype)
    return 2 * size**3 / min(turns({"product": lambda: torch.mm(a, b)}, seconds)["product"])


def packs(dtype) -> bool:
    """Whether oneDNN has this dtype on this processor."""
    supported = torch.ops.mkldnn
    if dtype is torch.bfloat16:
        return supported._is_mkldnn_bf16_supported()
    return dtype is torch.float32 or supported._is_mkldnn_fp16_supported()


def measured(layer, dtype, seconds: float) -> dict[str, float]:
    torch.manual_seed(0)
    tensors = layer.tensors(dtype)
    function = getattr(ops, layer.op)
    calls = {"ours": lambda: function(*tensors, **layer.named(), backend="cpu"), "eager": lambda: layer.eager(*tensors)}
    if packs(dtype):
        calls["packed"] = layer.packed(*tensors)
    wanted = calls["eager"]()
    for call in calls.values():  # all compute the same
        torch.testing.assert_close(call(), wanted, rtol=0.1, atol=0.1)
    return {name: statistics.median(found) for name, found in turns(calls, seconds).items()}


def row(layer, dtype, roof: float, seconds: float) -> dict:
    found = measured(layer, dtype, seconds)
    rate = layer.operations / found["ours"]
    arguments = OPS[layer.op].normalise(*layer.tensors(dtype), **layer.named())
    return {
        "layer": layer.label,
        "dtype": str(dtype).removeprefix("torch."),
        **{f"{name}_ms": round(1e3 * value, 4) for name, value in found.items()},
        "gflops": round(rate / 1e9, 1),
        "percent_of_peak": round(100 * rate / roof, 1),
        **{f"times_{name}": round(found[name] / found["ours"], 3) for name in ("eager", "packed") if name in found},
        "chosen": OPS[layer.op].select(arguments).name,
    }


def print_row(row: dict) -> None:
    times = f"{row['times_eager']:8.2f} {row.get('times_packed', float('nan')):8.2f}"
    rates = f"{row['ours_ms']:9.3f} {row['gflops']:8.1f} {row['percent_of_peak']:7.1f}%"
    print(f"{row['layer'] + ' ' + row['dtype']:52} {rates} {times}  {row['chosen']}", flush=True)


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

    layers = [*small()] if options.small else [*unet(), *decoder()]
    found = {"machine": machine(), "peak_gflops": {}, "rows": []}
    print(f"{'':52} {'ours ms':>9} {'GFLOP/s':>8} {'of peak':>8} {'x eager':>8} {'x packed':>8}  chosen")
    for name in options.dtype:
        dtype = getattr(torch, name)
        wanted = [layer for layer in layers if all(word in f"{layer.label} {name}".split() for word in options.only)]
        roof = peak(dtype, 256 if options.small else 2048, options.seconds) if wanted else 0.0
        found["peak_gflops"][name] = round(roof / 1e9, 1)
        for layer in wanted:
            now = row(layer, dtype, roof, options.seconds)
            found["rows"].append(now)
            print_row(now)
            if options.json:
                options.json.write_text(json.dumps(found, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
