"""The C++ extension modules: found, loaded once, called with the fields of csrc/ops.h by name.

They know no torch (csrc/bind.cpp), so a build runs under any torch version. `import torch` above comes first on
purpose: the CPU module then shares the OpenMP pool that torch has loaded instead of starting a second one.

    extension.attention({"q": q, "stride_qn": q.stride(0), ...}, *native.place(q))

gives each field of AttentionArgs but the workspace, which the binding allocates: a tensor (or None) where the struct
has a pointer, a code of DTYPES where it has a DType. A field that is missing or unknown is a TypeError that names it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterable
from types import ModuleType

import torch

from ldmfast.ops.registry import Choice

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.bool: 3}
MODULES = {"cpu": "_cpu", "cuda": "_cuda", "cuda-host": "_cuda_host"}
DEVICES = {"cpu": "cpu", "cuda": "cuda", "cuda-host": "cpu"}
HOW = {
    "cpu": "install ldmfast with a C++17 compiler on PATH",
    "cuda": "install ldmfast with nvcc on PATH",
    "cuda-host": "make host-kernels",
}


@functools.cache
def missing(backend: str) -> str | None:
    """Why the backend's module cannot be used, or None."""
    name = f"ldmfast.{MODULES[backend]}"
    if importlib.util.find_spec(name) is None:
        return f"was not built ({HOW[backend]})"
    try:
        importlib.import_module(name)
    except ImportError as error:
        return f"was built but does not load: {error}"
    return None


@functools.cache
def module(backend: str) -> ModuleType:
    return importlib.import_module(f"ldmfast.{MODULES[backend]}")


@functools.cache
def lacks(backend: str, op: str) -> str | None:
    """Why the backend's module cannot run this op, or None: it may be older than the op."""
    built = op in getattr(module(backend), "fields", ())
    return None if built else f"was built without {op} (build it again: {HOW[backend]})"


@functools.cache
def lanes() -> int:
    """Floats in a vector of the CPU module's instruction set, which decides what is faster; speeds.py bounds it."""
    return {"generic": 4, "avx2": 8}.get(module("cpu").active_isa(), 16)


@functools.cache
def tiles() -> int:
    """1 where the processor multiplies 16-bit types by tiles (AMX): oneDNN uses them, our kernels do not."""
    return int(torch.cpu._is_amx_tile_supported())


def place(tensor: torch.Tensor) -> tuple[int, int, Callable[[int], torch.Tensor]]:
    """Where a launcher runs: the device's index, the raw stream, and what allocates bytes there for its workspace.

    The CPU ignores the first two.
    """
    if not tensor.is_cuda:
        return _HOST
    index = tensor.device.index
    return index, torch.cuda.current_stream(index).cuda_stream, functools.partial(_bytes, device=tensor.device)


def _bytes(count: int, device: torch.device | str = "cpu") -> torch.Tensor:
    return torch.empty(count, dtype=torch.uint8, device=device)


_HOST = (-1, 0, _bytes)


def register(op: Choice, function: Callable, lead: int = 0, modules: Iterable[str] = MODULES) -> None:
    """Registers `function(extension, *args)` as the op's native backends, which refuse what was not built.

    lead     the argument whose dtype the kernel computes in
    modules  those that have the op: all of MODULES, or "cpu" alone (LDMFAST_CPU_OPS of csrc/ops.h)
    """

    def float64(*args):
        return "float64 is not compiled" if args[lead].dtype is torch.float64 else None

    for name in modules:

        def run(*args, _name=name):
            return function(module(_name), *args)

        backend = op.backend(name, devices={DEVICES[name]})(run)
        backend.refuses(lambda *args, _name=name: missing(_name) or lacks(_name, op.name))
        backend.refuses(float64)
