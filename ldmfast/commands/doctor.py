"""`python -m ldmfast doctor`: what is installed, what was built, and whether every op is right on this machine.

Every op and its gradient runs in every backend that does not refuse, on shapes of the SD1.5 U-Net, against float64. The
exit code is 1 if one of them is wrong or none can run, else 0.
"""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path

from ldmfast._version import __version__
from ldmfast.commands.common import command

PACKAGES = ("torch", "triton", "diffusers", "transformers", "accelerate", "safetensors", "peft", "numpy")


def add(commands):
    parser = command(commands, "doctor", "what is installed, what runs here, and whether it computes right", _doctor)
    parser.description = __doc__.split("\n\n")[0]


def _doctor(arguments) -> int:
    from ldmfast.ops import self_check
    from ldmfast.ops.registry import OPS

    for name, text in (*_versions(), *_hardware(), *_modules()):
        print(f"{name:<14} {text}")
    print()
    healthy = True
    for op in OPS.values():
        for dtype in self_check.TOLERANCE:
            for row, right in self_check.rows(op, dtype):
                print(row, flush=True)
                healthy &= right
    print("\neverything that runs here is right" if healthy else "\nWRONG: see the rows marked so above")
    return 0 if healthy else 1


def _versions():
    yield "ldmfast", f"{__version__} in {Path(__file__).parents[1]}"
    yield "python", f"{platform.python_version()} on {platform.platform()}"
    for name in PACKAGES:
        try:
            yield name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield name, "not installed"


def _hardware():
    import torch

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
    from ldmfast.ops import native
    from ldmfast.ops.contract.switch import chosen_numerics
    from ldmfast.ops.registry import chosen_backend

    for name in ("cpu", "cuda"):
        reason = native.missing(name)
        if reason:
            yield f"{name} module", reason
            continue
        module = native.module(name)
        isas = f"; instruction sets {module.compiled_isas()}, runs {module.active_isa()}" if name == "cpu" else ""
        yield f"{name} module", f"{module.flags}{isas}"
    yield "numerics", chosen_numerics()
    if chosen := chosen_backend():
        yield "backend", f"{chosen}, asked for by LDMFAST_BACKEND"
