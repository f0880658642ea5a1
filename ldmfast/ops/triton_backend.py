"""The Triton kernels: registered as backends, and what refuses for every one of them."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from ldmfast.ops.native import there
from ldmfast.ops.registry import Backend, Choice


def register(op: Choice, function: Callable) -> Backend:
    """Registers `function(kernel, *args)` as the op's backend, kernel being the launcher of its name in kernels/.

    Returns the backend, for what it refuses beside the conditions that every Triton kernel has.
    """

    def run(*args):
        with there(args[0]):  # Triton launches on the current device, wherever the tensors are
            return function(launcher(op.name), *args)

    backend = op.backend("triton", devices={"cuda", "cpu"})(run)
    backend.refuses(refuse)
    backend.planned[run] = lambda args: _plans().planned(run, args)
    return backend


@functools.cache
def _plans() -> ModuleType:
    """Imported when the first of these kernels runs, as they are."""
    return importlib.import_module("ldmfast.ops.triton_plans")


@functools.cache
def launcher(name: str) -> Callable:
    """The kernel file's function, imported when it first runs: Triton may not be installed."""
    return getattr(importlib.import_module(f"ldmfast.kernels.{name}"), name)


def refuse(*args: Any) -> str | None:
    """The conditions that all Triton backends share: installed, a GPU or the interpreter, a dtype it has."""
    if reason := _unusable():
        return reason
    if args[0].device.type != "cuda" and not interpreted():
        return "runs on cuda tensors (or on cpu tensors with TRITON_INTERPRET=1), not " + args[0].device.type
    if any(isinstance(value, torch.Tensor) and value.dtype is torch.float64 for value in args):
        return "float64 is not compiled"
    if interpreted() and any(isinstance(value, torch.Tensor) and value.dtype is torch.bfloat16 for value in args):
        return "the interpreter's tl.dot is wrong on bfloat16"
    return None


@functools.cache
def interpreted() -> bool:
    """Triton reads this when it decorates a kernel, so it holds for the whole process."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _unusable() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    return None
