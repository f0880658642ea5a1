"""Where a backend is slower than another one, which the automatic choice then prefers.

One frozen row for each region of shapes, dtypes and architectures. A row says whether it was measured; one that was
not is an estimate, to be replaced by the figures of bench/bench_ops.py on that GPU.
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
    figures  both times, with the shape and the GPU
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
_ZEN = "Zen 4, 2 cores, {}: {} of the speed of oneDNN with the weight packed before"
_CONVOLUTIONS = frozenset({torch.float32, torch.bfloat16})  # oneDNN's here; its float16 wants AVX512-FP16
_GENERIC = (("lanes", 0, 4),)  # compiled without vectors of this processor, where oneDNN has them
SLOWER = (
    # the kernel without tensor cores, which computes the scores D / 64 times
    Slower("attention", "cuda", "torch", _WIDE, (("D", 257, ANY),), SIXTEEN),
    *(
        Slower("attention", backend, "torch", _NARROW.format(time), (("D", D, D), _SELF), SIXTEEN, frozenset({90}))
        for backend, time in (("cuda", "190-215"), ("triton", "170-200"))
        for D in (64, 128)
    ),
    *(
        Slower("conv2d", "cpu", "torch", _ZEN.format(*figures), (bound,), dtypes, measured=True)
        for *figures, bound, dtypes in (
            ("1x1", "0.87-0.95", ("k", 1, 1), _CONVOLUTIONS),
            ("stride 2", "0.80-0.95", ("stride", 2, ANY), _CONVOLUTIONS),
            ("fewer than 32 channels in", "0.25-0.7", ("Ci", 0, 31), _CONVOLUTIONS),
            ("fewer than 32 channels out", "0.25-0.7 (float32 320 to 4: 1.2)", ("Co", 0, 31), _CONVOLUTIONS),
            ("bfloat16 3x3 at 8x8", "0.87-1.14", ("pixels", 0, 64), frozenset({torch.bfloat16})),
        )
    ),
    Slower(
        "conv2d",
        "cpu",
        "torch",
        _ZEN.format("float32 3x3 at 8x8 with AVX2 alone", "0.90-1.05"),
        (("pixels", 0, 64), ("lanes", 8, 8)),
        frozenset({torch.float32}),
        measured=True,
    ),
    Slower("conv2d", "cpu", "torch", "oneDNN has this processor's vectors", _GENERIC, _CONVOLUTIONS),
    Slower("linear", "cpu", "torch", "oneDNN has this processor's vectors", _GENERIC, _CONVOLUTIONS),
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
