"""`python -m ldmfast doctor`: what is installed, what was built, and whether every op is right on this machine.

Every op and its gradient runs in every backend that does not refuse, on shapes of the SD1.5 U-Net, against float64. The
exit code is 1 if one of them is wrong or none can run, else 0.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import sys

import torch

from ldmfast._version import __version__
from ldmfast.ops import native
from ldmfast.ops.registry import OPS, RANKS, Op, chosen_backend

PACKAGES = ("torch", "triton", "diffusers", "transformers", "accelerate", "safetensors", "peft", "numpy")
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="ldmfast doctor", description=__doc__.split("\n\n")[0])
    parser.parse_args(argv)
    for name, text in (*_versions(), *_hardware(), *_modules()):
        print(f"{name:<14} {text}")
    print()
    healthy = [_check_op(op, dtype) for op in OPS.values() for dtype in TOLERANCE]
    print("\neverything that runs here is right" if all(healthy) else "\nWRONG: see the rows marked so above")
    return 0 if all(healthy) else 1


def _versions():
    yield "ldmfast", f"{__version__} in {__file__.rsplit('/', 1)[0]}"
    yield "python", f"{platform.python_version()} on {platform.platform()}"
    for name in PACKAGES:
        try:
            yield name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield name, "not installed"


def _hardware():
    yield "cpu", f"{_cpu_name()}, {torch.get_num_threads()} threads"
    if not torch.cuda.is_available():
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is a CPU build"
        yield "gpu", f"none usable ({built})"
        return
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        yield (
            f"gpu {index}",
            (
                f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB, "
                f"driver {_driver()}, torch's CUDA {torch.version.cuda}"
            ),
        )


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _driver() -> str:
    try:
        with open("/proc/driver/nvidia/version") as text:
            return text.readline().split("Kernel Module")[-1].split()[0]
    except (OSError, IndexError):
        return "unknown"


def _modules():
    for name in ("cpu", "cuda"):
        reason = native.missing(name)
        if reason:
            yield f"{name} module", reason
            continue
        module = native.module(name)
        isas = f"; instruction sets {module.compiled_isas()}, runs {module.active_isa()}" if name == "cpu" else ""
        yield f"{name} module", f"{module.flags}{isas}"
    if chosen := chosen_backend():
        yield "backend", f"{chosen}, asked for by LDMFAST_BACKEND"


def _inputs(name: str, dtype: torch.dtype, device: str) -> tuple:
    """The op's arguments on a shape of the SD1.5 U-Net."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator).to(device, dtype)

    if name == "group_norm_silu":
        x = randn(2, 320, 64, 64).contiguous(memory_format=torch.channels_last)
        return x, randn(320), randn(320), 32, 1e-5, True, randn(2, 320), None, None
    if name == "attention":
        return randn(2, 1024, 8, 40), randn(2, 77, 8, 40), randn(2, 77, 8, 40), 40**-0.5, None
    if name == "timestep_mlp":
        w1, w2 = randn(1280, 320) * 320**-0.5, randn(1280, 1280) * 1280**-0.5
        return torch.tensor([999, 1], device=device), w1, randn(1280), w2, randn(1280), 320, True, 0.0, 10000.0
    return OPS[name].normalise(randn(1, 4, 64, 64), randn(2, 4, 64, 64), 0.3, 0.5, guidance=7.5)


def _check_op(op: Op, dtype: torch.dtype) -> bool:
    """Prints a row for each backend; False if one is wrong."""
    healthy = True
    for backend in op.ranked():
        if RANKS[backend.name] < 0:
            continue
        device = "cuda" if torch.cuda.is_available() and backend.name in ("cuda", "triton") else "cpu"
        args = _inputs(op.name, dtype, device)
        row = f"{op.name:<16} {str(dtype).removeprefix('torch.'):<9} {backend.name:<7}"
        if reason := backend.refusal(args):
            print(f"{row} refuses: {reason}")
            continue
        error = _error(op, backend, args)
        right = error <= TOLERANCE[dtype]  # NaN is not
        try:
            gradient = _gradient_error(op, backend.name, args)
            right &= gradient <= TOLERANCE[dtype]
            said = f", gradient {gradient:.1e}"
        except NotImplementedError as reason:
            said = f"; {reason}"
        healthy &= right
        print(f"{row} {'right' if right else 'WRONG'}: error {error:.1e} against float64{said}", flush=True)
    return healthy


def _error(op: Op, backend, args) -> float:
    exact = op.reference(*(value.double() if _is_float_tensor(value) else value for value in args))
    got = backend.run(*args)
    pairs = zip(*[value if isinstance(value, tuple) else (value,) for value in (got, exact)], strict=True)
    return max(((y.double() - true).norm() / true.norm()).item() for y, true in pairs)


def _gradient_error(op: Op, name: str, args) -> float:
    """The worst of the gradients of the outputs' sum of squares. Raises NotImplementedError where there is no kernel.

    The sum is divided by the root of its length, so that float16 holds the gradients of x and of a bias alike.
    """

    def gradients(function, args):
        args = [value.detach().requires_grad_() if _is_float_tensor(value) else value for value in args]
        got = function(*args)
        outputs = got if isinstance(got, tuple) else (got,)
        wanted = [value for value in args if _is_float_tensor(value)]
        return torch.autograd.grad([y.double().square().sum() / y.numel() ** 0.5 for y in outputs], wanted)

    got = gradients(lambda *args: op(*args, name), args)
    exact = gradients(op.reference, [value.double() if _is_float_tensor(value) else value for value in args])
    return max(((g.double() - true).norm() / true.norm()).item() for g, true in zip(got, exact, strict=True))


def _is_float_tensor(value) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


if __name__ == "__main__":
    sys.exit(main())
