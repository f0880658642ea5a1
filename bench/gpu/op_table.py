"""Every op at the U-Net's shapes on every backend, eager and each of PyTorch's attentions beside them.

    python bench/gpu/op_table.py --json ops.json [--op attention ...] [--dtype float16]

A row has microseconds of one launch, hot and cold, without the host's share (ldmfast/commands/measuring/clock.py), of
the host for one eager call, and the share of what a copy of the same bytes or a large matrix product reaches in this
run. Ops that no shape is listed of are timed on their example. Gradients too. Every row is in the JSON when it is done.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

BENCH = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(BENCH.parent), str(BENCH), str(BENCH / "gpu")]

import bench_ops  # noqa: E402
import clocks  # noqa: E402
import torch  # noqa: E402
from record import LOST, DeviceLost, Record  # noqa: E402
from torch.nn.attention import sdpa_kernel  # noqa: E402

from ldmfast.commands.measuring import clock  # noqa: E402
from ldmfast.commands.measuring.rows import SDPA  # noqa: E402
from ldmfast.ops import registry  # noqa: E402
from ldmfast.ops.registry import BACKWARD_OPS, OPS, RANKS  # noqa: E402

LARGE = (  # batch 2: a prompt and none
    bench_ops.group_norm(2, 320, 64, "last"),
    bench_ops.group_norm(2, 320, 64, "contiguous"),
    bench_ops.group_norm(2, 960, 64, "last"),
    bench_ops.group_norm(2, 640, 32, "last"),
    bench_ops.group_norm(2, 1280, 16, "last"),
    bench_ops.group_norm(2, 2560, 8, "last"),
    bench_ops.group_norm(1, 128, 512, "last"),
    bench_ops.attention(2, 4096, 4096, 8, 40),
    bench_ops.attention(2, 4096, 77, 8, 40),
    bench_ops.attention(2, 1024, 1024, 8, 80),
    bench_ops.attention(2, 1024, 77, 8, 80),
    bench_ops.attention(2, 256, 256, 8, 160),
    bench_ops.attention(2, 64, 64, 8, 160),
    bench_ops.attention(2, 4096, 4096, 10, 64),
    bench_ops.attention(2, 1024, 1024, 20, 64),
    bench_ops.attention(1, 4096, 4096, 1, 512),
    bench_ops.timestep(2, 320, 1280),
    bench_ops.ddim(1, 64),
    bench_ops.ddim(8, 64),
    bench_ops.ddim(1, 128),
)
TINY = (
    bench_ops.group_norm(1, 32, 4, "last"),
    bench_ops.attention(1, 16, 16, 2, 8),
    bench_ops.timestep(1, 32, 32),
    bench_ops.ddim(1, 4),
)
BACKWARD = ("group_norm_silu", "attention", "timestep_mlp")


@dataclass(frozen=True)
class Timed:
    """A call whose buffers are made by `make`, as often as cold launches need. size: bytes that it reads and writes."""

    name: str
    make: Callable[[], Callable]
    size: int
    about: dict


def tensors(values) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value


def size_of(*values) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors(values))


def forward(case, dtype: torch.dtype) -> Iterator[Timed]:
    """Each backend, then eager; of attention each of PyTorch's kernels."""
    args, kwargs = case.make(dtype)
    op = OPS[case.op]
    size = size_of(*args, *kwargs.values()) + size_of(*_outputs(op.run(*op.normalise(*args, **kwargs), None)))
    about = {
        "op": case.op,
        "shape": case.shape,
        "dtype": _short(dtype),
        "unit": case.unit,
        "amount": case.amount(dtype),
    }

    def ours(backend):
        def make():
            made, named = case.make(dtype)
            given = op.normalise(*made, **named)
            if reason := op.backends[backend].refusal(given):
                raise NotImplementedError(reason)
            return functools.partial(op.backends[backend].run, *given)

        return make

    def eager(kernel=None):
        def make():
            made, named = case.make(dtype)

            def call():
                if kernel is None:
                    return case.eager(*made, **named)
                with sdpa_kernel(SDPA[kernel]):
                    return case.eager(*made, **named)

            return call

        return make

    for backend in backends(op):
        yield Timed(f"{_label(about)} {backend}", ours(backend), size, about | {"backend": backend})
    yield Timed(f"{_label(about)} eager", eager(), size, about | {"backend": "eager"})
    for kernel in SDPA if case.op == "attention" else ():
        yield Timed(f"{_label(about)} SDPA {kernel}", eager(kernel), size, about | {"backend": f"SDPA {kernel}"})


def gradient(case, dtype: torch.dtype) -> Iterator[Timed]:
    """The backward op alone. Eager's is in a training step (step_time.py --work train): autograd is no launch."""
    op, inputs = bench_ops.gradient_inputs(case, dtype)
    size = size_of(*inputs) + size_of(*_outputs(op.run(*inputs, None)))
    amount = case.amount(dtype) * bench_ops.SHARE[case.op]
    about = {"op": op.name, "shape": case.shape, "dtype": _short(dtype), "unit": case.unit, "amount": amount}

    def ours(backend):
        def make():
            given = bench_ops.gradient_inputs(case, dtype)[1]
            if reason := op.backends[backend].refusal(given):
                raise NotImplementedError(reason)
            return functools.partial(op.backends[backend].run, *given)

        return make

    for backend in backends(op):
        yield Timed(f"{_label(about)} {backend}", ours(backend), size, about | {"backend": backend})


def example(op, dtype: torch.dtype, device: str) -> Iterator[Timed]:
    """An op that no case is of, on its example."""
    given = op.example(dtype, device)
    size = size_of(*given) + size_of(*_outputs(op.run(*given, None)))
    shape = "x".join(str(n) for n in given[0].shape) + " example"
    about = {"op": op.name, "shape": shape, "dtype": _short(dtype), "unit": "GB/s", "amount": size}

    def ours(backend):
        def make():
            given = op.example(dtype, device)
            if reason := op.backends[backend].refusal(given):
                raise NotImplementedError(reason)
            return functools.partial(op.backends[backend].run, *given)

        return make

    for backend in [*backends(op), "torch"]:
        yield Timed(f"{_label(about)} {backend}", ours(backend), size, about | {"backend": backend})


def backends(op) -> list[str]:
    """Those that it has, best first, but the reference, which eager stands for."""
    return [backend.name for backend in op.ranked() if RANKS[backend.name] > 0]


def _outputs(found) -> tuple:
    return found if isinstance(found, tuple) else (found,)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _label(about: dict) -> str:
    return f"{about['op']} {about['shape']} {about['dtype']}"


def figures(timed: Timed, device, seconds: float, roofs: dict) -> dict:
    """Hot, cold and host microseconds, the rate hot, and the percentage of its roof."""
    first = timed.make()
    hot = clock.per_call(device, [first], seconds)
    many = clock.rounds_for_cold(device, timed.size)
    cold = clock.per_call(device, [first, *(timed.make() for _ in range(many - 1))], seconds)
    found = {"hot_us": 1e6 * hot, "cold_us": 1e6 * cold, "host_us": 1e6 * clock.host_seconds(device, first, 20)}
    found["cold_buffers"] = many
    scale = 1e9 if timed.about["unit"] == "GB/s" else 1e12
    found["rate_hot"] = timed.about["amount"] / hot / scale
    if roof := roofs.get((timed.about["unit"], timed.about["dtype"])):
        found["percent_of_roof"] = 100 * timed.about["amount"] / hot / roof
    return {name: round(value, 3) if isinstance(value, float) else value for name, value in found.items()}


def roof(record: Record, device, dtype: torch.dtype, tiny: bool) -> dict:
    """{(unit, dtype): bytes or operations a second}: a copy of half a GiB, a product of 8192 x 8192 matrices."""
    size, n = (1 << 16, 64) if tiny else (1 << 29, 8192)
    source = torch.ones(size // 2, dtype=torch.uint8, device=device.kind)
    target = torch.empty_like(source)
    a, b = torch.randn(2, n, n, device=device.kind).to(dtype)
    calls = {
        "GB/s": (f"copy of {size // 2} bytes", size, lambda: target.copy_(source)),
        "TFLOP/s": (f"product {n} cubed", 2 * n**3, lambda: torch.mm(a, b)),
    }
    found = {}
    for unit, (name, amount, call) in calls.items():

        def once(call=call, amount=amount, unit=unit):
            seconds = clock.per_call(device, [call], 0.3, launches=3)
            scale = 1e9 if unit == "GB/s" else 1e12
            return {"hot_us": round(1e6 * seconds, 3), "rate_hot": round(amount / seconds / scale, 3)}

        about = {
            "unit": unit,
            "amount": amount,
            "op": "roof",
            "shape": name,
            "dtype": _short(dtype),
            "backend": "torch",
        }
        row = record.measure(f"{name} {_short(dtype)}", once, **about)
        if "rate_hot" in row:
            found[unit, _short(dtype)] = row["rate_hot"] * (1e9 if unit == "GB/s" else 1e12)
    return found


def every(options, device) -> Iterator[Timed]:
    """What is timed, in the order in which a run of few minutes wants it."""
    cases = TINY if options.tiny else LARGE
    for dtype in (getattr(torch, name) for name in options.dtype):
        for case in cases:
            yield from forward(case, dtype)
        for op in OPS.values():
            if op.name not in {case.op for case in cases} and not options.tiny | (op.example is None):
                yield from example(op, dtype, device.kind)
        for case in cases:
            if case.op in BACKWARD and f"{case.op}_backward" in BACKWARD_OPS:
                yield from gradient(case, dtype)


def once(timed: Timed, device) -> None:
    """One launch between cudaProfilerStart and Stop, for ncu --profile-from-start off; two before it do not count."""
    call = timed.make()
    call(), call()
    device.wait()
    if device.kind == "cuda":
        torch.cuda.profiler.start()
    call()
    device.wait()
    if device.kind == "cuda":
        torch.cuda.profiler.stop()


@torch.no_grad()
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--op", nargs="+", default=[], help="these only")
    parser.add_argument("--dtype", nargs="+", default=["float16"], choices=["float16", "bfloat16", "float32"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=0.1, help="of measuring, hot and cold each")
    parser.add_argument("--tiny", action="store_true", help="a few small shapes")
    parser.add_argument("--once", action="store_true", help="one launch of each of ours, for ncu; no figures")
    parser.add_argument("--resume", action="store_true", help="keep the rows that the JSON has")
    options = parser.parse_args(argv)
    device = clock.device(options.device)
    record = Record(options.json, {"what": "ops", **device.about()}, options.resume)
    try:
        with clocks.watched(record, device.kind == "cuda"):
            roofs = {}
            for name in () if options.once else options.dtype:
                roofs |= roof(record, device, getattr(torch, name), options.tiny)
            for timed in every(options, device):
                if options.op and timed.about["op"].removesuffix("_backward") not in options.op:
                    continue
                if not options.once:
                    call = functools.partial(figures, timed, device, options.seconds, roofs)
                    record.measure(timed.name, call, **timed.about)
                elif timed.about["backend"] in registry.BACKENDS:
                    record.measure(timed.name, lambda timed=timed: once(timed, device) or {"launched": 1})
    except DeviceLost:
        return LOST
    return record.status


if __name__ == "__main__":
    sys.exit(main())
