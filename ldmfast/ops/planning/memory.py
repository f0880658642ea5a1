"""Where a plan has the memory of its outputs and workspaces from.

A plan knows their sizes, so torch's own function for compiled code (`_empty_strided_cpu`, `_empty_strided_cuda`) can
make them: 0.6 us, where `torch.empty_like` takes 1.1, which goes through the dispatcher. It differs in two ways, which
`Memory.plainly` says: it allocates on the current device, and it leaves what it allocates as it is where torch is to
fill it (`torch.utils.deterministic.fill_uninitialized_memory`). Then, and in a build of torch without it, a plan makes
its tensors by `maker_of` and `allocator`.
"""

from __future__ import annotations

import ctypes
import functools
import operator
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

_guards = getattr(getattr(torch._C, "_dynamo", None), "guards", None)
_EMPTY = {device: getattr(_guards, f"_empty_strided_{device}", None) for device in ("cpu", "cuda")}
# a build of torch without CUDA has no such functions; the stream's address without an object about it takes 0.1 us
raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)
current_device = getattr(torch._C, "_cuda_getDevice", None)


@functools.cache
def allocator(device: torch.device) -> Callable[[int], torch.Tensor]:
    """What allocates bytes there."""
    with torch.inference_mode(False):  # it outlives this call
        return torch.empty(0, dtype=torch.uint8, device=device).new_empty  # a third less than torch.empty


@functools.cache
def quick_allocator(kind: str) -> Callable[[int], torch.Tensor]:
    """The same on the current device of this kind, by torch's function for compiled code."""
    empty, bytes_ = _EMPTY[kind], torch.uint8
    return lambda size: empty((size,), (1,), bytes_)


def maker_of(output: torch.Tensor, args: Sequence) -> tuple[int, Callable[[torch.Tensor], torch.Tensor]]:
    """(the place of an argument, what makes a tensor of it that is laid out as output is)"""
    alike = [i for i, value in enumerate(args) if isinstance(value, torch.Tensor) and value.dtype is output.dtype]
    for i in alike:
        if args[i].shape == output.shape and torch.empty_like(args[i], device="meta").stride() == output.stride():
            return i, torch.empty_like  # with the least to read of all
    kind = {} if alike else {"dtype": output.dtype}
    make = operator.methodcaller("new_empty_strided", output.shape, output.stride(), **kind)
    return (alike[0] if alike else 0), make


class Memory:
    """The tensors that a plan makes, as lines of a function of `args`: made0, made1, ...

    outputs    as the first call returned them
    workspace  other memory, of which a kernel sees nothing but the address
    lines      by torch's function for compiled code, or None where there is none
    plainly    when these lines will not do, as a Python expression
    slow_lines by torch.empty_like and the like
    known      the values of the names in both
    """

    def __init__(self, args: Sequence, outputs: Sequence[torch.Tensor], workspace: Sequence[torch.Tensor] = ()) -> None:
        device = args[0].device
        empty = _EMPTY.get(device.type)
        made = range(len(outputs) + len(workspace))
        sizes = [tensor.numel() * tensor.element_size() for tensor in workspace]
        makers = [maker_of(output, args) for output in outputs]
        makers += [(0, functools.partial(_bytes, allocator(device), size)) for size in sizes]
        laid = [(tuple(tensor.shape), tensor.stride(), tensor.dtype) for tensor in outputs]
        laid += [((size,), (1,), torch.uint8) for size in sizes]
        self.slow_lines = [f"made{i} = make{i}(args[{like}])" for i, (like, _) in enumerate(makers)]
        self.lines = [f"made{i} = empty(size{i}, stride{i}, dtype{i})" for i in made] if empty else None
        self.plainly = "deterministic()"
        self.known = {f"make{i}": make for i, (_, make) in enumerate(makers)}
        for i, values in enumerate(laid):
            self.known |= zip((f"size{i}", f"stride{i}", f"dtype{i}"), values, strict=True)
        self.known |= {"empty": empty, "deterministic": torch._C._get_deterministic_algorithms}
        if device.type == "cuda":
            self.plainly += f" or current_device() != {device.index}"
            self.known |= {"current_device": current_device, "raw_stream": raw_stream}


def _bytes(allocate: Callable, size: int, like: torch.Tensor) -> torch.Tensor:
    return allocate(size)


def written(lines: Sequence[str], known: dict) -> Callable:
    """A function of `args` of these lines, in which these names have these values."""
    return _maker("\n        ".join(lines), tuple(known))(*known.values())


@functools.lru_cache(maxsize=1024)
def _maker(lines: str, known: tuple[str, ...]) -> Callable:
    """What makes a plan of these lines and the values of these names: an op's plans are alike but for the values, and
    a function reads those of one about it in a fifth of the time that globals take."""
    found: dict[str, Any] = {"__name__": __name__}
    exec(f"def make({', '.join(known)}):\n    def plan(args):\n        {lines}\n    return plan", found)
    return found["make"]


def give_back_freed() -> None:
    """Gives freed memory that malloc keeps back to the system, where the C library can (glibc).

    What a process frees between two blocks in use, or in blocks of up to 32 MiB, it goes on holding otherwise.
    """
    trim = None if torch.compiler.is_compiling() else _malloc_trim()
    if trim is not None:
        trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
