"""The C++ extension modules: found, loaded once, called with the fields of csrc/ops.h by name.

They know no torch (csrc/bind.cpp), so a build runs under any torch version. `import torch` above comes first on
purpose: the CPU module then shares the OpenMP pool that torch has loaded instead of starting a second one.

    extension.attention({"q": q, "stride_qn": q.stride(0), ...}, *native.place(q))

gives each field of AttentionArgs but the workspace, which the binding allocates: a tensor (or None) where the struct
has a pointer, a code of DTYPES where it has a DType. A field that is missing or unknown is a TypeError that names it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

import torch

from ldmfast.ops.dispatcher import Values
from ldmfast.ops.planning.memory import Memory, allocator, current_device, quick_allocator, raw_stream, written
from ldmfast.ops.registry import Choice

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.bool: 3}
MODULES = {"cpu": "_cpu", "cuda": "_cuda", "cuda-host": "_cuda_host"}
DEVICES = {"cpu": "cpu", "cuda": "cuda", "cuda-host": "cpu"}
HOW = {
    "cpu": "install ldmfast with a C++17 compiler on PATH",
    "cuda": "install ldmfast with nvcc 12.0 or later on PATH",
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


CAPABILITY = (8, 0)  # the oldest that csrc/cuda/CMakeLists.txt names: Ampere


@functools.cache
def unsupported(device: int) -> str | None:
    """Why the CUDA module cannot run on this GPU, or under its driver, or None."""
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < CAPABILITY:
        return f"needs compute capability {CAPABILITY[0]}.{CAPABILITY[1]} (Ampere), this GPU has {major}.{minor}"
    runtime, driver = getattr(module("cuda"), "versions", lambda: (0, 0))()  # not in a module that was built before
    if driver // 1000 < runtime // 1000:  # within one major version any driver will do
        return (
            f"was built with CUDA {_version(runtime)}, which needs a newer driver than this one for CUDA "
            f"{_version(driver)} (update it, or install ldmfast with an nvcc of CUDA {driver // 1000})"
        )
    return None


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


@functools.cache
def lanes() -> int:
    """Floats in a vector of the CPU module's instruction set, which decides what is faster; speeds.py bounds it."""
    return {"generic": 4, "avx2": 8}.get(module("cpu").active_isa(), 16)


@functools.cache
def pairs() -> int:
    """1 where our kernels multiply pairs of bfloat16 (AVX512-BF16), at twice float32's rate; else 0: they widen it."""
    return int(not missing("cpu") and module("cpu").active_isa() == "avx512_bf16")


def multiplies_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 faster than float32: Intel's do so by tiles alone (dispatch.cpp)."""
    if tiles(torch.bfloat16):
        return True
    return bool(pairs()) if not missing("cpu") else torch.cpu._is_avx512_bf16_supported()


@functools.cache
def tiles(dtype: torch.dtype) -> int:
    """Who multiplies this type by tiles (AMX) on this processor: 0 nobody, 1 oneDNN alone, 2 our kernels, too."""
    if dtype is torch.float16:
        return int(torch.cpu._is_amx_fp16_supported())
    if dtype is not torch.bfloat16 or not torch.cpu._is_amx_tile_supported():
        return 0
    return 1 if missing("cpu") or module("cpu").active_isa() != "amx" else 2


def place(tensor: torch.Tensor) -> tuple[int, int, Callable[[int], torch.Tensor]]:
    """Where a launcher runs: the device's index, the raw stream, and what allocates bytes there for its workspace.

    The CPU ignores the first two.
    """
    if not tensor.is_cuda:
        return _HOST
    index = tensor.device.index
    return index, raw_stream(index), allocator(tensor.device)


_HOST = (-1, 0, allocator(torch.device("cpu")))


def there(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """Context in which the tensor's device is the current one. The launcher's own way back, cudaSetDevice, would make a
    context of hundreds of MB on the device that is current now, were there none yet; PyTorch's does not.
    """
    if tensor.is_cuda and current_device() != tensor.device.index:
        return torch.cuda.device(tensor.device.index)
    return contextlib.nullcontext()


def _on(index: int, prepared: Callable) -> Callable:
    """A prepared launch on a GPU, made `there`."""

    def launch(*args):
        if current_device() == index:
            prepared(*args)
        else:
            with torch.cuda.device(index):
                prepared(*args)

    return launch


def register(op: Choice, function: Callable, lead: int = 0, modules: Iterable[str] = MODULES) -> None:
    """Registers `function(extension, *args)` as the op's native backends, which refuse what was not built.

    function passes its arguments on, or views of them that begin where they begin, copies, and what it returns,
             which the launch alone writes; the numbers that it passes may depend on the arguments' shapes, strides,
             dtypes, devices and values, not on their addresses
    lead     the argument whose dtype the kernel computes in
    modules  those that have the op: all of MODULES, or "cpu" alone (LDMFAST_CPU_OPS of csrc/ops.h)
    """

    def float64(*args):
        return "float64 is not compiled" if args[lead].dtype is torch.float64 else None

    for name in modules:

        def run(*args, _name=name):
            with there(args[0]):
                return function(module(_name), *args)

        backend = op.backend(name, devices={DEVICES[name]})(run)
        backend.refuses(lambda *args, _name=name: missing(_name) or lacks(_name, op.name))
        if name == "cuda":
            backend.refuses(lambda *args: unsupported(args[0].device.index) if args[0].is_cuda else None)
        backend.refuses(float64)
        backend.planned[run] = functools.partial(_planned, name, function)


class _Watched:
    """An extension module whose calls are noted."""

    def __init__(self, extension: ModuleType) -> None:
        self.extension, self.calls = extension, []

    def __getattr__(self, name: str) -> Callable:
        def call(fields, *where):
            self.calls.append((name, fields))
            return getattr(self.extension, name)(fields, *where)

        return call


def _planned(name: str, function: Callable, args: tuple) -> tuple[Any, Callable | None]:
    """The result of function, and how a call of the same signature is made with other addresses alone, or None.

    None where it made a copy of an argument, or another number of calls than one, and where it is not clear which
    argument an address is of.
    """
    watched = _Watched(module(name))
    with there(args[0]):
        result = function(watched, *args)
    outputs = result if isinstance(result, tuple) else (result,)
    if len(watched.calls) != 1 or not all(map(_is_fresh, outputs)):
        return result, None
    ((op, fields),) = watched.calls
    constants = [value for value in fields.values() if isinstance(value, torch.Tensor) and is_constant(value)]
    places = _places(fields, args, (*outputs, *constants))
    if places is None:
        return result, None
    prepare = getattr(module(name), f"prepare_{op}", None)
    if prepare is None:  # a module that was built before there were plans
        return result, None
    prepared = prepare(fields, tuple(places))
    several = isinstance(result, tuple)
    return result, _again(prepared, tuple(places.values()), args, outputs, constants, several)


def _again(
    prepared: Callable, places: tuple[int, ...], args: tuple, outputs: tuple, constants: list, several: bool
) -> Callable:
    """The function of the op's arguments, the backend's name last, that allocates the outputs and launches.

    Written out, of a call that takes two arguments on the CPU:

        def plan(args):
            if deterministic():
                return slowly(args)
            made0 = empty(size0, stride0, dtype0)
            launch((args[0], args[1], made0), -1, 0, allocate)
            return made0
    """
    index, _, allocate = place(args[0])
    memory = Memory(args, outputs)
    names = [*(f"args[{i}]" for i in range(len(args))), ""]  # the backend's name is no value of a launch
    names += [*(f"made{i}" for i in range(len(outputs))), *(f"constant{i}" for i in range(len(constants)))]
    taken = "".join(f"{names[i]}, " for i in places)
    stream = f"raw_stream({index})" if args[0].is_cuda else "0"
    returned = ", ".join(f"made{i}" for i in range(len(outputs))) + "," * several
    after = [f"launch(({taken}), {index}, {stream}, allocate)", f"return {returned}"]
    known = memory.known | {f"constant{i}": tensor for i, tensor in enumerate(constants)}
    slowly = written(
        [*memory.slow_lines, *after],
        known | {"launch": _on(index, prepared) if args[0].is_cuda else prepared, "allocate": allocate},
    )
    if memory.lines is None:
        return slowly
    known |= {"launch": prepared, "allocate": quick_allocator(args[0].device.type), "slowly": slowly}
    return written([f"if {memory.plainly}:", "    return slowly(args)", *memory.lines, *after], known)


def constant(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, which is kept as it is from now on: a plan may hold it."""
    tensor._ldmfast_constant = True
    return tensor


def is_constant(tensor: torch.Tensor) -> bool:
    return getattr(tensor, "_ldmfast_constant", False)


def _is_fresh(output: torch.Tensor) -> bool:
    """Whether it is a whole allocation, which nobody has written to but the launch, as far as that is counted."""
    written = not output.is_inference() and output._version > 0
    return (
        not written
        and output.storage_offset() == 0
        and output.untyped_storage().nbytes() == output.numel() * output.element_size()
    )


def _places(fields: dict, args: tuple, outputs: tuple) -> dict[str, int] | None:
    """By field, where in (*args, name, *outputs) the value stands that every call gives anew."""
    addresses = {value.data_ptr(): i for i, value in enumerate(args) if isinstance(value, torch.Tensor)}
    tensors = sum(isinstance(value, torch.Tensor) for value in args)
    if len(addresses) != tensors or 0 in addresses:
        return None
    found = {}
    for field, value in fields.items():
        if isinstance(value, torch.Tensor):
            made = [len(args) + 1 + j for j, output in enumerate(outputs) if output is value]
            found[field] = made[0] if made else addresses.get(value.data_ptr())
        elif isinstance(value, Values):
            found[field] = next((i for i, given in enumerate(args) if given is value), None)
    values = [i for i, value in enumerate(args) if isinstance(value, Values) and value]
    complete = None not in found.values() and set(values) <= set(found.values())
    return found if complete and all(len(args) + 1 + j in found.values() for j in range(len(outputs))) else None
