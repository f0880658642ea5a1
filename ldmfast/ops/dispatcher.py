"""Who watches a call: whether it must ask PyTorch's dispatcher, and whether its values are more than numbers."""

from __future__ import annotations

import operator
from collections.abc import Callable
from math import copysign
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from ldmfast.ops.contract.switch import modes

# by name, once: each dot costs as much as the question
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_mode = torch._C._is_torch_function_mode_enabled
_functorch_level = torch._C._functorch.maybe_current_level
_functorch_layers = torch._C._functorch.get_interpreter_stack
_VMAP = torch._C._functorch.TransformType.Vmap
_tracing = torch._C._get_tracing_state
_profiling = torch.autograd._profiler_enabled
_autocast = torch._C._is_any_autocast_enabled
_grad_enabled = torch.is_grad_enabled
_WHOLE = frozenset({int, bool, str})
_PLAIN = frozenset({Tensor, Parameter})
# what torch.compile asks whether tensors are as they were; without it every call has its signature taken
_compared = getattr(getattr(torch._C._dynamo, "guards", None), "TensorGuards", None)


@torch.compiler.assume_constant_result  # traced frames are guarded on both levels
def transformed() -> bool:
    """Whether forward-mode AD or one of torch.func's transforms (grad, vjp, jvp, vmap) watches.

    Tensors may then hold tangents or a hidden batch, which a kernel that reads memory would lose. Also for a frame that
    torch.compile traces.
    """
    return _functorch_level() is not None or forward_ad._current_level >= 0


@torch.compiler.assume_constant_result
def vmapped() -> bool:
    """Whether one of these transforms is vmap, under which tensors have no memory format but the contiguous one."""
    return any(layer.key() == _VMAP for layer in _functorch_layers() or ())


def laid_out(x: Tensor, layout: torch.memory_format) -> Tensor:
    """x in this layout, or as it is under vmap."""
    return x if vmapped() else x.contiguous(memory_format=layout)


class Values(tuple):
    """Numbers that a kernel takes as they come: a call's signature holds how many they are, not which."""

    __slots__ = ()


def _watched() -> Any:
    """Whether PyTorch's dispatcher is needed in this thread, whatever the arguments are."""
    return (
        (_dispatch_modes() and _dispatch_modes() > modes.count)  # those of `exact` have nothing to do with our ops
        or _function_mode()
        or _functorch_level()  # counted from 1
        or _tracing()
        or forward_ad._current_level >= 0
        or _profiling()
        or _autocast()
    )


def signature(args: tuple) -> tuple | None:
    """All that check, choice and kernel may ask of the arguments but the addresses: equal ones take the same way.

    None where PyTorch's dispatcher is needed: for autograd, autocast, torch.compile, modes, functorch, subclasses and
    negated tensors, and the profiler, which is to see the op by name; elsewhere, but for meta tensors, it would only
    pass the call on, at 19 us of a call's 27 us (ddim_step, 2 busy cores, torch 2.13). Empty where the dispatcher is
    not needed, but a tensor has no strides, or a value is of no kind that an op takes. Not for a frame that
    torch.compile traces.
    """
    if _watched():
        return None
    grad, found = _grad_enabled(), []
    for value in args:
        kind = type(value)
        if kind is Tensor or kind is Parameter:
            if grad and value.requires_grad or value.is_neg():
                return None
            try:
                found += (value.shape, value.stride(), value.dtype, value.device)
            except RuntimeError:  # it has no strides
                return ()
        elif value is None:
            found.append(None)
        elif kind in _WHOLE:
            found += (kind, value)  # 1 is True, and is not
        elif kind is float:
            found += (kind, value) if value else (kind, 0.0, copysign(1.0, value))  # 0.0 is -0.0, and is not
        elif kind is Values:
            found += (kind, len(value))
        elif isinstance(value, Tensor):
            return None
        elif kind is list or kind is tuple:
            found += (kind, *map(_exactly, value))
        else:
            return ()
    return tuple(found)


def _exactly(value):
    return type(value), value or repr(value)


class SeenCalls:
    """The plans of calls that have come before, found in less than half of the time that a `signature` takes.

    What is compared: the kinds of all arguments, the values of those that are no tensors, and, by PyTorch in one call,
    each tensor's type, dispatch keys (what the thread adds or leaves out among them), dtype, device, sizes, strides and
    whether it requires a gradient. A call is noted once it has come twice with the same signature.

    numbers  the place of the argument that is always `Values`, if there is one
    """

    def __init__(self, numbers: int | None) -> None:
        self.numbers = numbers

    def look(self, noted: dict[tuple, list], args: tuple, setting: tuple) -> tuple[tuple | None, Callable | None]:
        """(what such a call is noted under, the plan that was noted for it), each None where there is none."""
        kinds = tuple(map(type, args))
        if (
            kinds[0] not in _PLAIN
            or _compared is None
            # of what `_watched` asks, what does not show in the keys that the thread adds to a tensor's or leaves out
            or _function_mode()
            or forward_ad._current_level >= 0
            or _profiling()
            or _tracing()  # shows too late: it notes a size that is read
            or (setting[1] and _dispatch_modes() > modes.count)  # those of `exact` are in the keys of calls under it
        ):
            return None, None
        count = 0 if self.numbers is None else len(args[self.numbers])
        key = args[0].numel(), _grad_enabled(), count, setting, kinds
        for others, picked, zeros, signs, same, tensors, plan in noted.get(key, ()):
            if picked(args) == others and same(*tensors(args)):
                if not signs or [*map(copysign, signs, zeros(args))] == signs:
                    return key, plan
        return key, None

    def note(self, noted: dict[tuple, list], key: tuple, args: tuple, plan: Callable) -> None:
        """Of a call that has a signature, and no meta tensor."""
        places = [i for i, value in enumerate(args) if isinstance(value, Tensor)]
        tensors = _tuple_of(places)
        sizes, strides = ([list(of(value)) for value in tensors(args)] for of in (Tensor.size, Tensor.stride))
        same = _compared(*tensors(args), dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
        others = [i for i in range(len(args)) if i not in places and i != self.numbers]
        picked = _read(others, [i for i in others if _by_letter(args[i])])
        found = noted.setdefault(key, [])
        if len(found) >= ALIKE:
            found.clear()
        zeros = _tuple_of(2 * [i for i in others if type(args[i]) is float and args[i] == 0])  # twice: one is no tuple
        signs = [copysign(1.0, value) for value in zeros(args)]  # 0.0 == -0.0
        found.append((picked(args), picked, zeros, signs, same, tensors, plan))


ALIKE = 16  # noted calls that differ in the values of what is no tensor, or in the others' sizes


def _by_letter(value: Any) -> bool:
    """Whether == is too little or too much: NaN is not NaN, and [1] is [True]."""
    return isinstance(value, (list, tuple)) or value != value


def _read(places: list[int], by_letter: list[int]) -> Callable[[tuple], tuple]:
    """What takes the values at these places, some of them as they are written."""
    if not by_letter:
        return _tuple_of(places)
    plain, written = _tuple_of([i for i in places if i not in by_letter]), _tuple_of(by_letter)
    return lambda args: (*plain(args), *map(repr, written(args)))


def _tuple_of(places: list[int]) -> Callable[[tuple], tuple]:
    """What takes the values at these places, as a tuple also of one."""
    if len(places) > 1:
        return operator.itemgetter(*places)
    return lambda args: tuple([args[place] for place in places])


def dispatcher_needed(args: tuple) -> bool:
    """False where PyTorch's dispatcher would only pass the call on: it has a `signature`, and no tensor is a meta."""
    return signature(args) is None or any(isinstance(value, Tensor) and value.is_meta for value in args)
