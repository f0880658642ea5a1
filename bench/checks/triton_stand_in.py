"""Triton without a GPU, up to the launch: its own wrapper, arguments and choice of a binary, on CPU tensors.

Nothing is compiled and nothing runs. `installed(launched)` gives Triton a driver of an H100 that is not there, a
compiler that notes what it was asked for, and a launcher that calls `launched`: the binary, then what Triton hands over
(three sizes of the grid, stream, function, metadata, launch metadata, two hooks, and the kernel's arguments).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import types
from collections.abc import Callable, Iterator

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver

from ldmfast.ops import triton_backend
from ldmfast.ops.registry import BACKWARD_OPS, OPS, choose_anew

TARGET = GPUTarget("cuda", 90, 32)


class Binary(CompiledKernel):
    """What stands for a compiled kernel: the source that it was asked for, with types, constants and attributes."""

    def __init__(self, source, options: dict, launched: Callable) -> None:
        self.src, self.options, self.name = source, options, "stand-in"
        self.module, self.function = "loaded", id(self)
        self.metadata = types.SimpleNamespace(target=TARGET)
        self.packed_metadata = (4, 1, 0)
        self._run = functools.partial(launched, self)

    def __del__(self) -> None:
        """There is no module to unload."""

    def asked(self) -> tuple:
        """All that two binaries of one kernel can differ in."""
        return self.src.fn, self.src.signature, self.src.constants, self.src.attrs, self.options


class _Driver:
    launcher_cls = None

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def installed(launched: Callable) -> Iterator[None]:
    """Within it Triton's backends take CPU tensors, and every launch of theirs is a call of `launched`."""
    ops = [op for op in (*OPS.values(), *BACKWARD_OPS.values()) if "triton" in op.backends]
    before, compiler = driver._active, triton.compiler.compile
    kept = {op.name: list(op.backends["triton"].conditions) for op in ops}
    driver.set_active(_Driver())
    triton.compiler.compile = lambda source, target=None, options=None, **others: Binary(source, options, launched)
    for op in ops:
        op.backends["triton"].conditions.remove(triton_backend.refuse)
    choose_anew()
    try:
        yield
    finally:
        driver._active, triton.compiler.compile = before, compiler
        for op in ops:
            op.backends["triton"].conditions[:] = kept[op.name]
        choose_anew()
        _forget(ops)


def _forget(ops) -> None:
    """The kernels' binaries that stand for others."""
    for op in ops:
        for value in vars(importlib.import_module(f"ldmfast.kernels.{op.name}")).values():
            if isinstance(value, triton.JITFunction):
                value.device_caches.clear()
