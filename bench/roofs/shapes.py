"""What bench/layers.py measures: each convolution, linear layer and attention of SD1.5, SDXL and the decoder.

A shape makes its tensors, and calls stock's function on them; `packed` is oneDNN's with the weight in its own layout.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F


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
    def kind(self) -> str:
        if self.upsample > 1 or self.stride > 1:
            return "3x3 enlarged" if self.upsample > 1 else f"{self.k}x{self.k} stride {self.stride}"
        return f"{self.k}x{self.k}"

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

    op = kind = "linear"

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


@dataclass(frozen=True)
class Attention:
    where: str
    L: int
    S: int
    H: int
    D: int

    op = kind = "attention"

    @property
    def label(self) -> str:
        return f"{self.where} attention {self.L}x{self.S} {self.H} of {self.D}"

    @property
    def operations(self) -> int:
        return 4 * self.L * self.S * self.H * self.D

    def tensors(self, dtype):
        return tuple(torch.randn(1, length, self.H, self.D).to(dtype) for length in (self.L, self.S, self.S))

    def named(self) -> dict:
        return {}

    def eager(self, q, k, v):
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    packed = None  # it has no weight


Layer: TypeAlias = Convolution | Linear | Attention


def unet() -> Iterator[Layer]:
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
        for keys in (side * side, 77):
            yield Attention("unet", side * side, keys, 8, width // 8)
    yield Convolution("unet", 320, 4, 64)
    for width in (320, 640, 1280):
        yield Linear("unet", 77, 768, width)  # keys and values of the prompt
        yield Linear("unet", 1, 1280, width)  # the time of a residual block
    yield Linear("unet", 1, 320, 1280)


def sdxl() -> Iterator[Layer]:
    """SDXL's U-Net, one 64x64 sample (512x512 pixels), each shape once."""
    blocks = {64: (320, 640, 960), 32: (320, 640, 960, 1280, 1920), 16: (640, 1280, 1920, 2560)}
    yield Convolution("sdxl", 4, 320, 64)
    for width, side in ((320, 64), (640, 32), (1280, 16)):
        for Ci in blocks[side]:
            yield Convolution("sdxl", Ci, width, side)
            if Ci != width:
                yield Convolution("sdxl", Ci, width, side, k=1)
        if side > 16:
            yield Convolution("sdxl", width, width, side, stride=2)
        if side < 64:
            yield Convolution("sdxl", width, width, side, upsample=2)
            for K, N in ((width, width), (width, 8 * width), (4 * width, width)):
                yield Linear("sdxl", side * side, K, N)
            yield Linear("sdxl", 77, 2048, width)
            for keys in (side * side, 77):
                yield Attention("sdxl", side * side, keys, width // 64, 64)
    yield Convolution("sdxl", 320, 4, 64)


def decoder() -> Iterator[Layer]:
    """The autoencoder's decoder to 512x512, each shape once."""
    yield Convolution("decoder", 4, 4, 64, k=1)
    yield Convolution("decoder", 4, 512, 64)
    yield Linear("decoder", 64 * 64, 512, 512)
    yield Attention("decoder", 64 * 64, 64 * 64, 1, 512)
    for Ci, Co, side in ((512, 512, 64), (512, 512, 128), (512, 256, 256), (256, 128, 512)):
        yield Convolution("decoder", Ci, Co, side)
        if Ci != Co:
            yield Convolution("decoder", Co, Co, side)
            yield Convolution("decoder", Ci, Co, side, k=1)
        if side < 512:
            yield Convolution("decoder", Co, Co, side, upsample=2)
    yield Convolution("decoder", 128, 3, 512)


def small() -> Iterator[Layer]:
    yield Convolution("small", 64, 64, 16)
    yield Convolution("small", 64, 32, 8, k=1)
    yield Convolution("small", 32, 32, 8, upsample=2)
    yield Linear("small", 64, 64, 128)
    yield Attention("small", 64, 77, 2, 40)
