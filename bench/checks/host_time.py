"""What a call of each op costs the host, in microseconds: all of Python, the binding and the allocation of outputs.

    python bench/checks/host_time.py                 cpu, cuda-host and triton
    python bench/checks/host_time.py --most 8        exits 1 where an op takes longer
    python bench/checks/host_time.py --wrapper       Triton's kernels through its own wrapper at each call

Nothing is launched: the extension modules fill the argument struct and return; Triton chooses its binaries as for an
H100 and calls a launcher that does nothing (triton_stand_in.py). So the tensors lie on the CPU; on a GPU the device and
its raw stream are two more questions. `cuda-host` takes the way of `cuda`. The least of --rounds rounds counts: what
else runs on the machine only adds. `first` is a call of a new signature, which checks the arguments and chooses a
backend: the median of calls with all plans forgotten. A module that was built without `set_launching` is stood for by
an empty function, which leaves the binding out.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import time
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "bench" / "checks")]
NATIVE = ("cpu", "cuda-host")


def calls():
    """(op, what, backend -> a call): SD1.5's first level, guided, in bfloat16."""
    import torch

    from ldmfast import ops

    def empty(*shape, kind=torch.bfloat16):
        return torch.empty(shape, dtype=kind)

    x = empty(2, 320, 64, 64).contiguous(memory_format=torch.channels_last)
    row, shift, rows, factors = empty(320), empty(320), empty(2, 320), empty(2, 320, kind=torch.float32)
    q, k, v = empty(2, 4096, 8, 40), empty(2, 77, 8, 40), empty(2, 77, 8, 40)
    tokens, weight, kernel = empty(2, 4096, 320), empty(320, 320), empty(320, 320, 3, 3)
    time_layers = empty(1280, 320), empty(1280), empty(1280, 1280), empty(1280)
    t, latents, outputs = empty(2, kind=torch.float32), empty(1, 4, 64, 64), empty(2, 4, 64, 64)
    table, at = empty(1000, 7, kind=torch.float32), torch.tensor([500])
    residual, wide, three = q.view(2, 4096, 320), empty(2, 4096, 2560), [empty(320, 320) for _ in range(3)]
    other = torch.empty_like(x)
    named = {"norm_scale": factors, "norm_shift": factors.clone(), "norm_silu": True}
    yield "group_norm_silu", "", lambda b: ops.group_norm_silu(x, row, shift, 32, backend=b)
    yield "group_norm_silu", "add", lambda b: ops.group_norm_silu(x, row, shift, 32, add=rows, backend=b)
    yield "group_norm_affine", "", lambda b: ops.group_norm_affine(x, row, shift, 32, backend=b)
    yield "layer_norm", "", lambda b: ops.layer_norm(tokens, row, shift, backend=b)
    yield "attention", "cross", lambda b: ops.attention(q, k, v, backend=b)
    yield "timestep_mlp", "", lambda b: ops.timestep_mlp(t, *time_layers, dim=320, backend=b)
    yield "linear", "", lambda b: ops.linear(tokens, weight, row, backend=b)
    yield "linear", "residual", lambda b: ops.linear(tokens, weight, row, residual=residual, backend=b)
    yield "conv2d", "", lambda b: ops.conv2d(x, kernel, row, padding=1, backend=b)
    yield "conv2d", "norm", lambda b: ops.conv2d(x, kernel, row, padding=1, add=rows, **named, backend=b)
    yield "geglu", "", lambda b: ops.geglu(wide, backend=b)
    yield "bias_residual", "", lambda b: ops.bias_residual(x, row, residual=other, backend=b)
    yield "residual_layer_norm", "", lambda b: ops.residual_layer_norm(tokens, residual, row, shift, backend=b)
    yield ("qkv_projection", "", lambda b: ops.qkv_projection(tokens, *three, layer_norm=(row, shift, 1e-5), backend=b))
    yield "ddim_step", "numbers", lambda b: ops.ddim_step(latents, outputs, 0.3, 0.5, guidance=7.5, backend=b)
    if "row" in ops.ddim_step.__kwdefaults__:
        yield (
            "ddim_step",
            "row",
            lambda b: ops.ddim_step(latents, outputs, guidance=7.5, table=table, row=at, backend=b),
        )


def without_launches(backend: str, stack: contextlib.ExitStack) -> None:
    """Until the stack is left, calls of this backend end before the launch."""
    from ldmfast.ops import native

    if backend == "triton":
        import triton_stand_in

        stack.enter_context(triton_stand_in.installed(lambda *args: None))
        return
    module = native.module(backend)
    if hasattr(module, "set_launching"):
        module.set_launching(False)
        return
    names = [name for name in dir(module) if not name.startswith("_")]
    empty = {name: (lambda *args: None) if name in module.fields else getattr(module, name) for name in names}
    stand_in, found = types.SimpleNamespace(**empty), native.module
    native.module = lambda name: stand_in if name == backend else found(name)


def least(call, rounds: int) -> float:
    for _ in range(20):
        call()
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        for _ in range(50):
            call()
        times.append((time.perf_counter() - started) / 50)
    return min(times) * 1e6


def first(op, call, rounds: int) -> float | None:
    if not hasattr(op, "plans"):
        return None
    times = []
    for _ in range(rounds):
        op.plans.clear()
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times) * 1e6


def measure(backend: str, rounds: int, wrapper: bool) -> None:
    """Prints a JSON line for each call that the backend takes."""
    import torch

    from ldmfast.ops.registry import OPS

    with contextlib.ExitStack() as stack, torch.no_grad():
        without_launches(backend, stack)
        for name, what, call in calls():
            op = OPS[name]
            if backend in op.backends:
                if wrapper and backend == "triton":
                    op.backends[backend].planned.clear()
                repeated = least(lambda: call(backend), rounds)  # noqa: B023
                new = first(op, lambda: call(backend), rounds)  # noqa: B023
                print(json.dumps([name, what, round(repeated, 2), new and round(new, 1)]), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--most", type=float, help="microseconds that a call may take")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--backend", nargs="*", choices=(*NATIVE, "triton"), default=(*NATIVE, "triton"))
    parser.add_argument("--wrapper", action="store_true", help="without ldmfast/ops/triton_plans.py")
    parser.add_argument("--here", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        measure(options.here, options.rounds, options.wrapper)
        return 0
    over = 0
    print(f"{'op':20} {'':9} {'backend':10} {'us a call':>9} {'first':>6}")
    for backend in options.backend:
        command = [sys.executable, __file__, "--here", backend, "--rounds", str(options.rounds)]
        command += ["--wrapper"] if options.wrapper else []
        found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        for name, what, repeated, new in map(json.loads, found.stdout.splitlines()):
            print(f"{name:20} {what:9} {backend:10} {repeated:9.1f} {new if new is not None else '':>6}")
            over += options.most is not None and repeated > options.most
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
