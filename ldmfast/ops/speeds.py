"""Where a backend is slower than another one, which the automatic choice then prefers.

One frozen row for each region of shapes, dtypes and architectures. A row says whether it was measured; one that was
not is an estimate, to be replaced by the figures of bench/bench_ops.py on that GPU. Products on a CPU are measured by
bench/layers.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ldmfast.ops.registry import Choice

SIXTEEN = frozenset({torch.float16, torch.bfloat16})
ANY = float("inf")


@dataclass(frozen=True)
class Slower:
    """`backend` takes longer than `than` for `op`, where every bound holds.

    bounds   (name, least, most) of the sizes that the op gives to `register`
    dtypes   of the tensor that the kernel computes in; None: any
    archs    compute capabilities, 90 for sm_90; None: any
    figures  both times or their ratio, with the shape and the machine
    """

    op: str
    backend: str
    than: str
    figures: str
    bounds: tuple[tuple[str, float, float], ...] = ()
    dtypes: frozenset[torch.dtype] | None = None
    archs: frozenset[int] | None = None
    measured: bool = False

    def holds(self, sizes: dict[str, int], tensor: torch.Tensor) -> bool:
        return (
            (self.dtypes is None or tensor.dtype in self.dtypes)
            and all(least <= sizes[name] <= most for name, least, most in self.bounds)
            and (self.archs is None or architecture(tensor.device) in self.archs)
        )

    def sentence(self) -> str:
        return f"{self.than} is faster ({'measured' if self.measured else 'an estimate, not measured'}: {self.figures})"


_WIDE = "H100, float16, L = S = 4096, one head of 512: 5-7 ms against 0.4-0.6 ms of SDPA"
_NARROW = "H100, float16, L = S = 4096, 20 heads of 64: {} us against 155-170 us of SDPA"
_SELF = ("S", 256, ANY)  # not the few keys of a prompt
# Products on a CPU, against the reference: oneDNN, which lays the weight out anew in every call. `lanes`: floats in a
# vector of our instruction set. torch has oneDNN's bfloat16 with AVX-512 only and its float16 with AVX512-FP16 only:
# without them ours is faster. With a norm, a second part or a residual, ours saves the passes over memory that the
# reference makes for them, which cost more.
_ZEN = "Zen 4, 2 cores, {}, {}: {} of the reference's speed"
_ALONE = ("folded", 0, 0)
_FLOAT32, _BFLOAT16 = (torch.float32, (_ALONE,)), (torch.bfloat16, (_ALONE, ("lanes", 16, 16)))
_PRODUCTS = (
    ("conv2d", "1x1 at 32x32 and more", (("k", 1, 1), ("pixels", 1024, ANY)), ("0.93-1.02", "0.88-1.05")),
    ("conv2d", "stride 2 to 32x32", (("stride", 2, ANY), ("pixels", 1024, ANY)), ("0.85-0.86", "0.85-0.88")),
    ("conv2d", "3 to 24 channels in", (("Ci", 0, 31),), ("0.82-1.11", "0.71-0.99")),
    ("conv2d", "12 to 24 channels out", (("Co", 9, 31),), ("0.64-1.28", "0.65-1.10")),
    ("conv2d", "1x1 to 4 channels", (("k", 1, 1), ("Co", 0, 8)), ("0.54", "0.58")),
    ("linear", "one row", (("M", 0, 1),), ("0.74-1.24", None)),
)
_GENERIC = (("lanes", 0, 4),)
_TILES = "a processor with AMX: 8 times the products of AVX512-BF16 a cycle, whatever is folded"
SLOWER = (
    # the kernel without tensor cores, which computes the scores D / 64 times
    Slower("attention", "cuda", "torch", _WIDE, (("D", 257, ANY),), SIXTEEN),
    *(
        Slower("attention", backend, "torch", _NARROW.format(time), (("D", D, D), _SELF), SIXTEEN, frozenset({90}))
        for backend, time in (("cuda", "190-215"), ("triton", "170-200"))
        for D in (64, 128)
    ),
    *(
        Slower(op, "cpu", "torch", _ZEN.format(kind, what, ratio), bounds + lanes, frozenset({dtype}), measured=True)
        for op, what, bounds, ratios in _PRODUCTS
        for (dtype, lanes), kind, ratio in zip((_FLOAT32, _BFLOAT16), ("float32", "bfloat16"), ratios, strict=True)
        if ratio
    ),
    *(
        Slower(op, "cpu", "torch", _ZEN.format(kind, "no vectors", ratio), _GENERIC, frozenset({dtype}), measured=True)
        for op, kind, dtype, ratio in (
            ("conv2d", "bfloat16", torch.bfloat16, "0.15-1.37"),
            ("linear", "float32", torch.float32, "0.13-0.38"),
            ("linear", "bfloat16", torch.bfloat16, "0.12-0.49"),
        )
    ),
    # beside cuBLAS Triton wins by what it saves: a pass over the output costs more than a tenth of such a product
    Slower("linear", "triton", "torch", "a plain product is cuBLAS's", (_ALONE,)),
    Slower("linear", "triton", "torch", "no tensor cores in float32", dtypes=frozenset({torch.float32})),
    Slower("qkv_projection", "triton", "torch", "no tensor cores in float32", dtypes=frozenset({torch.float32})),
    *(Slower(op, "cpu", "torch", _TILES, (("tiles", 1, 1),), SIXTEEN) for op in ("conv2d", "linear")),
    Slower("group_norm_silu_backward", "cuda", "triton", "H100, [2, 320, 64, 64] float16: 25-35 us against 15 us"),
)


def register(op: Choice, sizes: Callable[..., dict[str, int]], lead: int = 0) -> None:
    """Gives the op's backends their rows of SLOWER. Call it when all of them are registered.

    sizes  called as sizes(*args): the sizes by name that the rows bound
    lead   the argument whose dtype and device the rows mean
    """
    for row in SLOWER:
        if row.op == op.name:
            op.backends[row.backend].slower(_condition(op, row, sizes, lead))


def _condition(op, row: Slower, sizes: Callable, lead: int) -> Callable:
    def condition(*args):
        # a backend that refuses is no better choice
        if row.holds(sizes(*args), args[lead]) and op.backends[row.than].refusal(args) is None:
            return row.sentence()
        return None

    return condition


def architecture(device: torch.device) -> int | None:
    """90 for sm_90; None where the device is no GPU."""
    return _architecture(device) if device.type == "cuda" else None


@functools.cache
def _architecture(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
