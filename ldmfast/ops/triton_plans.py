"""How a call of Triton kernels is made again without the Python of the op, of the kernel's file and of Triton.

Triton's own wrapper binds, inspects and looks up at each launch, and ours computes grids and strides before it. All
that is the same for calls of one signature (dispatcher.py) but for the addresses and, where an op has `Values`, some
floats. So the first call notes its launches and the memory that was allocated for them; the next one goes through
Triton's wrapper, which says what binaries it chose; the calls after it hand addresses to these binaries' launchers.

Of what varies, Triton makes its choice by nothing but whether an address is a multiple of 16 (floats are never looked
at), so a plan keeps the binaries by that, for each address. A call whose addresses are divisible in a new way, and any
call while Triton's launches are watched or its debug or instrumentation mode is on, goes through Triton's wrapper.
tests/ops/test_triton_plans.py compares with the wrapper's own choice.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs
from triton.compiler import CompiledKernel

from ldmfast.kernels.launch_kernel import watched
from ldmfast.ops.dispatcher import Values
from ldmfast.ops.native import is_constant
from ldmfast.ops.planning.memory import Memory, written

_address = torch.Tensor.data_ptr
_aten = torch.ops.aten
_EMPTY = {_aten.empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty, _aten.new_empty_strided}


@dataclass
class _Launch:
    """One launch as it was made."""

    kernel: Any
    grid: tuple[int, ...]
    values: list  # the kernel's arguments in its order, constants among them
    options: dict  # warps and stages


class _Watch(TorchDispatchMode):
    """Notes launches and the tensors that are made; and whether anything but memory and views of it was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[_Launch] = []
        self.made: list[torch.Tensor] = []
        self.computes = self.launching = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not self.launching:  # Triton's interpreter computes with tensors
            if func.overloadpacket in _EMPTY:
                self.made.append(result)
            else:
                self.computes |= not _is_view(func)
        return result

    def launch(self, kernel, grid, args, named) -> None:
        parameters = inspect.signature(kernel.fn).parameters
        given = {name: named[name] for name in parameters if name in named}
        options = {name: value for name, value in named.items() if name not in parameters}
        values = list(inspect.signature(kernel.fn).bind(*args, **given).arguments.values())
        self.launches.append(_Launch(kernel, grid, values, options))
        self.launching = True
        try:
            kernel[grid](*args, **named)
        finally:
            self.launching = False


def _is_view(func) -> bool:
    """Whether all that it returns is memory of its arguments, to which it does not write."""
    infos = [value.alias_info for value in func._schema.returns]
    return bool(infos) and all(info is not None and not info.is_write for info in infos)


def planned(function: Callable, args: tuple) -> tuple[Any, Callable | None]:
    """function(*args), and how a call of the same signature is made with other addresses and Values; None if it cannot.

    None where function does more than allocate, take views and launch (it may fill a cache at its first call), and
    where it is not clear which argument an address or a number is of.
    """
    # each number an object of its own, by which a launch's number is known
    args = tuple(Values(float(v) * 1.0 for v in value) if type(value) is Values else value for value in args)
    for _ in range(2):
        watch = _Watch()
        with watch, watched(watch.launch):
            result = function(*args)
        if not watch.computes:
            break
    if watch.computes or not watch.launches:
        return result, None
    outputs = result if isinstance(result, tuple) else (result,)
    return result, _plan(watch, args, outputs, isinstance(result, tuple))


def _plan(watch: _Watch, args: tuple, outputs: tuple, several: bool) -> Callable | None:
    made = [_whole(output, watch.made) for output in outputs]
    if None in made or len(set(made)) != len(made):
        return None
    results = list(outputs)
    tensors = [value for launch in watch.launches for value in launch.values if isinstance(value, torch.Tensor)]
    reached = {tensor.data_ptr() for tensor in tensors}
    workspace = [t for i, t in enumerate(watch.made) if i not in made and t.data_ptr() in reached]
    constants = [tensor for tensor in tensors if is_constant(tensor)]
    # in this order a call's tensors are counted; where a backend's name stands is None
    pool = [*args, None, *results, *workspace, *constants]
    numbers = next((list(value) for value in args if type(value) is Values), [])
    found = _places(watch.launches, pool, numbers)
    if found is None:
        return None
    memory = Memory(args, outputs, workspace)
    at = next((i for i, value in enumerate(args) if type(value) is Values), None)
    names = [*(f"args[{i}]" for i in range(len(args))), ""]
    names += [f"made{i}" for i in range(len(results) + len(workspace))]
    names += [f"constant{i}" for i in range(len(constants))]
    launches = _Launches(watch.launches, *found[1:], args[0].device)
    known = memory.known | {f"constant{i}": tensor for i, tensor in enumerate(constants)}
    returned = ", ".join(f"made{i}" for i in range(len(results))) + "," * several
    rest = {
        "tensors": [names[place] for place in found[0]],
        "numbers": f"[*map(float, args[{at}])]" if numbers else "()",
        "returned": returned,
    }
    slowly = launches.plan(memory.slow_lines, known=known, **rest)
    if memory.lines is None:
        return slowly
    lines = [f"if {memory.plainly}:", "    return slowly(args)", *memory.lines]
    return launches.plan(lines, known=known | {"slowly": slowly}, **rest)


def _whole(output: torch.Tensor, made: Sequence[torch.Tensor]) -> int | None:
    """Which allocation the output is the whole of, or None."""
    for i, tensor in enumerate(made):
        if tensor.data_ptr() == output.data_ptr() and tensor.dtype is output.dtype:
            return i if tensor.numel() == output.numel() else None
    return None


def _places(launches: list[_Launch], pool: list, numbers: list[float]) -> tuple[list, list, list, list] | None:
    """(the places in pool of the tensors that the launches take; as which dtypes they take them; for each launch, of
    which of these, of the numbers or of what is fixed its kernel's arguments are; what is fixed), or None where it is
    not clear."""
    addresses: dict[int, int] = {}
    for i, value in enumerate(pool):
        if (
            isinstance(value, torch.Tensor)
            and addresses.setdefault(value.data_ptr(), i) != i
            and not is_constant(value)
        ):
            return None  # two at one address
    objects = {id(number): i for i, number in enumerate(numbers)}
    used: dict[int, torch.dtype] = {}
    fixed, orders = [], []
    for launch in launches:
        order = []
        for value in launch.values:
            if isinstance(value, torch.Tensor):
                place = addresses.get(value.data_ptr())
                if place is None or used.setdefault(place, value.dtype) is not value.dtype:
                    return None
                order.append(("tensor", list(used).index(place)))
            elif id(value) in objects:
                order.append(("number", objects[id(value)]))
            elif value is None or type(value) in (bool, int, float, str):
                order.append(("fixed", len(fixed)))
                fixed.append(value)
            else:
                return None
        orders.append(order)
    if {place for order in orders for kind, place in order if kind == "number"} != set(range(len(numbers))):
        return None
    return list(used), list(used.values()), orders, fixed


class _Launches:
    """The launches of a plan, and the binaries that Triton chose for them."""

    def __init__(self, launches: list[_Launch], dtypes: list, orders: list, fixed: list, device: torch.device) -> None:
        self.launches = [(launch.kernel, launch.grid, launch.options) for launch in launches]  # not the first tensors
        self.dtypes, self.orders, self.fixed = dtypes, orders, fixed
        self.binaries: dict[Any, list[tuple]] = {}  # by which addresses are multiples of 16; 0 where all are
        self.index = device.index if device.type == "cuda" else None

    def plan(self, made: list[str], *, tensors: list[str], numbers: str, returned: str, known: dict) -> Callable:
        """The function of a call's arguments, written out: going through lists of them takes longer than the launches.

        Of one launch that takes an argument and what it returns:

            def plan(args):
                if deterministic():
                    return slowly(args)
                made0 = empty(size0, stride0, dtype0)
                tensor0, tensor1 = address(args[0]), address(made0)
                key = (tensor0 | tensor1) & 15
                if key:
                    key = tensor0 & 15 == 0, tensor1 & 15 == 0
                binaries = kept(key)
                if binaries is None or asked_otherwise():
                    through_triton(key, (args[0], made0), ())
                    return made0
                ((run0, function0, packed0),) = binaries
                run0(x0, y0, z0, 0, function0, packed0, None, None, None, tensor0, tensor1, fixed0)
                return made0
        """
        addresses = [f"tensor{i}" for i in range(len(tensors))]
        counted = sorted({f"number{i}" for order in self.orders for kind, i in order if kind == "number"})
        elsewhere = "" if self.index is None or "slowly" in known else f" or current_device() != {self.index}"
        lines = [
            *made,
            f"{', '.join(addresses)}, = {', '.join(f'address({name})' for name in tensors)},",
            f"key = ({' | '.join(addresses)}) & 15",
            "if key:",
            f"    key = {', '.join(f'{name} & 15 == 0' for name in addresses)},",
            "binaries = kept(key)",
            f"if binaries is None or asked_otherwise(){elsewhere}:",
            f"    through_triton(key, ({', '.join(tensors)},), {numbers})",
            f"    return {returned}",
            f"{''.join(f'(run{i}, function{i}, packed{i}), ' for i in range(len(self.launches)))}= binaries",
        ]
        if counted:
            lines.append(f"{', '.join(counted)}, = {numbers}")
        if self.index is not None:
            lines.append(f"stream = raw_stream({self.index})")
        stream = "0" if self.index is None else "stream"
        for i, order in enumerate(self.orders):
            values = ", ".join(f"{kind}{j}" for kind, j in order)
            lines.append(f"run{i}(x{i}, y{i}, z{i}, {stream}, function{i}, packed{i}, None, None, None, {values})")
        lines.append(f"return {returned}")
        known = known | {f"fixed{i}": value for i, value in enumerate(self.fixed)}
        for i, (_, grid, _) in enumerate(self.launches):
            known |= zip((f"x{i}", f"y{i}", f"z{i}"), (*grid, 1, 1), strict=False)
        known |= {"address": _address, "kept": self.binaries.get, "asked_otherwise": _asked_otherwise}
        known |= {"through_triton": self.through_triton}
        return written(lines, known)

    def through_triton(self, key: Any, tensors: tuple, numbers: Sequence[float]) -> None:
        given = {"tensor": [t.view(dtype) for t, dtype in zip(tensors, self.dtypes, strict=True)]}
        given |= {"number": numbers, "fixed": self.fixed}
        kept = []
        there = contextlib.nullcontext() if self.index is None else torch.cuda.device(self.index)
        with there:
            for (kernel, grid, options), order in zip(self.launches, self.orders, strict=True):
                binary = kernel[grid](*(given[kind][i] for kind, i in order), **options)
                if _is_binary(binary):
                    kept.append((binary.run, binary.function, binary.packed_metadata))
        if len(kept) == len(self.launches) and not _asked_otherwise():
            self.binaries[key] = kept


def _is_binary(value: Any) -> bool:
    """Whether it is a compiled kernel for CUDA: the interpreter has none, and on other GPUs Triton looks at more."""
    return isinstance(value, CompiledKernel) and value.metadata.target.backend == "cuda"


_runtime, _compilation = knobs.runtime, knobs.compilation


def _asked_otherwise() -> Any:
    """Whether Triton's launches are watched, or other code than usual is asked for: its wrapper is to see the call."""
    enter, leave = _runtime.launch_enter_hook, _runtime.launch_exit_hook
    return (
        getattr(enter, "calls", enter)
        or getattr(leave, "calls", leave)
        or _runtime.debug
        or _compilation.instrumentation_mode
    )
