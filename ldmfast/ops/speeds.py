"""Where a backend is slower than another one, which the automatic choice then prefers.

One frozen row for each region of shapes, dtypes and architectures. A row says whether it was measured; one that was
not is an estimate, to be replaced by the figures of bench/gpu on that GPU. Products on a CPU are measured by
bench/layers.py. What `ldmfast tune` measured on this machine (measured/tuned.py) goes before all of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ldmfast.ops.measured import tuned
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
# vector of our instruction set; `pairs`, `tiles`: what multiplies bfloat16 there. Where ours widens it, oneDNN widens
# it, too, or multiplies it by slow pairs (Emerald Rapids: 0.60-0.78 of our speed in 1x1 and stride 2). With a norm, a
# second part or a residual, ours saves the passes over memory that the reference makes for them, which cost more.
_ZEN = "Zen 4, 2 cores, {}, {}: {} of the reference's speed"
_ALONE = ("folded", 0, 0)
# A few inputs and outputs have a form of their own: 4 -> 4 at 64x64 1.3-2.2 of the reference's speed (Zen 4, AVX2).
_WIDER = ("narrow", 0, 0)
_FLOAT32, _BFLOAT16 = (torch.float32, (_ALONE, _WIDER)), (torch.bfloat16, (_ALONE, ("pairs", 1, 1), ("tiles", 0, 0)))
_PRODUCTS = (
    ("conv2d", "1x1 at 32x32 and more", (("k", 1, 1), ("pixels", 1024, ANY)), (None, "0.88-1.05")),
    ("conv2d", "stride 2 to 32x32", (("stride", 2, ANY), ("pixels", 1024, ANY)), (None, "0.85-0.88")),
    ("conv2d", "1x1 to 4 channels", (("k", 1, 1), ("Co", 0, 8)), ("0.54", "0.58")),
    ("conv2d", "3 at 256x256, AVX2", (("Ci", 0, 8), ("pixels", 1 << 16, ANY), ("lanes", 8, 8)), ("0.77-0.82", None)),
    *(  # not with AVX2, where ours is faster: 1.1-2.3 from few channels, 1.1-1.6 to few, 1.0-1.4 in 1x1, 1.1-2 a row
        (op, what, (*bounds, lanes), ratios)
        for op, what, bounds, ratios in (
            ("conv2d", "3 to 24 channels in", (("Ci", 0, 31),), ("0.82-1.11", "0.71-0.99")),
            ("conv2d", "12 to 24 channels out", (("Co", 9, 31),), ("0.64-1.28", "0.65-1.10")),
            ("conv2d", "1x1 at 32x32 and more", (("k", 1, 1), ("pixels", 1024, ANY)), ("0.93-1.02", None)),
            ("linear", "one row", (("M", 0, 1),), ("0.74-1.24", None)),
        )
        for lanes in (("lanes", 0, 4), ("lanes", 16, 16))
    ),
)
_GENERIC = (("lanes", 0, 4),)
_TILES = "a processor with AMX: 8 times the products of AVX512-BF16 a cycle, whatever is folded"
SLOWER = (
    # the kernel without tensor cores, which computes the scores D / 64 times
    Slower("attention", "cuda", "sdpa", _WIDE, (("D", 257, ANY),), SIXTEEN),
    *(
        Slower("attention", backend, "sdpa", _NARROW.format(time), (("D", D, D), _SELF), SIXTEEN, frozenset({90}))
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
    Slower(
        "conv2d_weight_backward",
        "cpu",
        "torch",
        "Zen 5, 1 thread, float32, 3 and 4 channels in: 0.56-0.73 of its speed",
        (("Ci", 0, 8),),
        measured=True,
    ),
    Slower(
        "conv2d_weight_backward",
        "cpu",
        "torch",
        "Zen 5, 2 threads, float32, 32768 pixels: a step of an autoencoder's training took 198-210 ms, not 187-195",
        (("pixels", 1 << 15, 1 << 40),),
        measured=True,
    ),
    Slower("conv2d_weight_backward", "cpu", "torch", "no vectors, as conv2d's other products there", _GENERIC),
    *(Slower(op, "cpu", "torch", _TILES, (("tiles", 1, 1),), SIXTEEN) for op in ("conv2d", "linear")),
    Slower("group_norm_silu_backward", "cuda", "triton", "H100, [2, 320, 64, 64] float16: 14-20 us against 15 us"),
)


class _Speeds:
    """What is known of one op's backends: this machine's table (`ldmfast tune`), else the rows of SLOWER."""

    def __init__(self, op: Choice, sizes: Callable[..., dict[str, int]], lead: int) -> None:
        self.op, self.sizes, self.lead = op, sizes, lead
        self.rows = {name: [row for row in SLOWER if (row.op, row.backend) == (op.name, name)] for name in op.backends}
        self.known: dict[tuple, list[tuple[str, str]]] = {}
        tuned.on_forgetting(self.forget)

    def forget(self) -> None:
        """What was chosen by a table that is no longer there is chosen anew."""
        self.known.clear()
        getattr(self.op, "plans", {}).clear()  # of calls that were seen before

    def condition(self, name: str) -> Callable:
        """The sentence of a faster backend that does not refuse, or None: asked at every call."""
        rows = self.rows[name]

        def slower(*args):
            tensor = args[self.lead]
            if not rows and tuned.table(tensor.device) is None:
                return None
            sizes = self.sizes(*args)
            key = (name, tensor.device, tensor.dtype, architecture(tensor.device), *sizes.values())
            faster = self.known.get(key)
            if faster is None:
                if len(self.known) >= MOST_KNOWN:
                    self.known.clear()
                faster = self.known[key] = self.faster(name, sizes, tensor)
            for than, sentence in faster:
                if self.op.backends[than].refusal(args) is None:  # a backend that refuses is no better choice
                    return sentence
            return None

        return slower

    def faster(self, name: str, sizes: dict[str, int], tensor: torch.Tensor) -> list[tuple[str, str]]:
        """(backend, sentence) of those that are faster at this shape, the fastest first."""
        point = self.point(sizes, tensor)
        if point is None or name not in point[1]:
            return [(row.than, row.sentence()) for row in self.rows[name] if row.holds(sizes, tensor)]
        where, times = point

        def sentence(than: str) -> str:
            figures = f"{1e6 * times[than]:.4g} against {1e6 * times[name]:.4g} us"
            at = ", ".join(f"{size} {value}" for size, value in where.items())
            return f"{than} is faster (measured on this machine: {figures} at {at})"

        faster = [than for than in sorted(times, key=times.get) if times[than] * tuned.NEAR < times[name]]
        return [(than, sentence(than)) for than in faster if than in self.op.backends]

    def point(self, sizes: dict[str, int], tensor: torch.Tensor) -> tuple[dict, dict] | None:
        table = tuned.table(tensor.device)
        return table and table.times(self.op.name, tensor.dtype, sizes)

    def origin(self, args) -> str:
        """Where the choice for these arguments comes from, as a sentence's end."""
        tensor, sizes = args[self.lead], self.sizes(*args)
        if self.point(sizes, tensor):
            table = tuned.table(tensor.device)
            return f"`ldmfast tune` on this machine, {table.when} ({table.path})"
        rows = [row for rows in self.rows.values() for row in rows if row.holds(sizes, tensor)]
        if any(row.measured for row in rows):
            return "ldmfast's own table, measured on another machine (`ldmfast tune` measures on this one)"
        if rows:
            return "ldmfast's own table, an estimate (`ldmfast tune` measures on this machine)"
        return "the backends' ranks: no figures for this shape (`ldmfast tune` measures on this machine)"


MOST_KNOWN = 4096  # shapes that an op remembers


def register(op: Choice, sizes: Callable[..., dict[str, int]], lead: int = 0) -> None:
    """Lets the choice between the op's backends go by their times. Call it when all of them are registered.

    sizes  called as sizes(*args): the sizes by name that a time depends on, and that the rows bound; always the same
           names in the same order
    lead   the argument whose dtype and device are meant
    """
    speeds = _Speeds(op, sizes, lead)
    for name, backend in op.backends.items():
        backend.slower(speeds.condition(name))
    op.sizes, op.lead, op.origin = sizes, lead, speeds.origin


def architecture(device: torch.device) -> int | None:
    """90 for sm_90; None where the device is no GPU."""
    return _architecture(device) if device.type == "cuda" else None


@functools.cache
def _architecture(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
