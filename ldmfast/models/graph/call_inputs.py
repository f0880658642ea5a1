"""What a call takes, as a graph has it: tensors in buffers of their own, all else part of the key it is found by."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

_CONSTANTS = (bool, int, float, str, torch.dtype, torch.device, type(None))
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class CallInputs:
    """The arguments {name: tensors, constants, or lists, tuples and dicts of them} of a call on `device`.

    tensors  in their order
    key      what distinguishes the call from others: constants, and the tensors' shapes, dtypes and layouts
    refusal  why no graph takes them, as a clause, or None
    """

    def __init__(self, arguments: dict[str, Any], device: torch.device) -> None:
        self.tensors: list[Tensor] = []
        self.refusal: str | None = None
        self._device = device
        self.key = tuple((name, self._described(name, value)) for name, value in arguments.items())

    def _described(self, name: str, value: Any) -> tuple:
        kind = type(value)
        if kind is Tensor or kind is Parameter:
            return self._tensor(name, value)
        if kind in _CONSTANTS:
            return kind, value
        if kind is dict:
            return kind, tuple((each, self._described(f"{name}[{each!r}]", value[each])) for each in value)
        if kind is list or kind is tuple:
            return kind, tuple(self._described(f"{name}[{i}]", each) for i, each in enumerate(value))
        self.refusal = f"{name} is a {kind.__name__}"
        return (kind,)

    def _tensor(self, name: str, x: Tensor) -> tuple:
        if x.device != self._device:
            self.refusal = f"{name} is on {x.device}, not {self._device}"
        elif x.is_neg() or x.is_conj() or x.layout is not torch.strided:
            self.refusal = f"{name} is no plain tensor"
        self.tensors.append(x)
        return x.shape, x.dtype, layout(x)


class StaticInputs:
    """The buffers that a graph reads in place of a call's tensors, and the arguments made of them."""

    def __init__(self, arguments: dict[str, Any], inputs: CallInputs) -> None:
        # not inference tensors, which no call outside of that mode could write to
        with torch.inference_mode(False), torch.no_grad():
            self.buffers = [
                torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=layout(x)) for x in inputs.tensors
            ]
        self._arguments = rebuilt(arguments, iter(self.buffers))
        by_dtype: dict[torch.dtype, list[int]] = {}
        for i, buffer in enumerate(self.buffers):
            by_dtype.setdefault(buffer.dtype, []).append(i)
        self._groups = [(indices, [self.buffers[i] for i in indices]) for indices in by_dtype.values()]
        self.fill(inputs)

    def fill(self, inputs: CallInputs) -> None:
        """The call's values into the buffers: a launch for each dtype."""
        with torch.no_grad():
            for indices, buffers in self._groups:
                torch._foreach_copy_(buffers, [inputs.tensors[i] for i in indices])

    def arguments(self) -> dict[str, Any]:
        """The call's arguments over the buffers, in lists and dicts that nobody else holds."""
        return rebuilt(self._arguments, iter(self.buffers))

    @property
    def bytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers)


def layout(x: Tensor) -> torch.memory_format:
    """channels_last for what is that and no more, as `layers.in_layout_of` distinguishes; else contiguous."""
    if x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def rebuilt(value: Any, tensors: Iterator[Tensor]) -> Any:
    """The same lists, tuples and dicts anew, with the next of `tensors` in each tensor's place."""
    if isinstance(value, Tensor):
        return next(tensors)
    if isinstance(value, dict):
        return {name: rebuilt(each, tensors) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(rebuilt(each, tensors) for each in value)
    return value


def shortened(before: dict[str, Any], after: dict[str, Any]) -> dict[str, int]:
    """{name: how many} of the lists among a call's arguments from whose front the call took something.

    T2I-Adapter's residuals: a U-Net pops what it uses.
    """
    lists = {name: len(value) for name, value in before.items() if isinstance(value, list)}
    return {name: length - len(after[name]) for name, length in lists.items() if length != len(after[name])}


def difference(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> str | None:
    """How `got` differs from `wanted` in a bit, shape or layout, as a clause; None if it does not."""
    for x, y in zip(got, wanted, strict=True):
        if (x.shape, x.dtype, x.stride()) != (y.shape, y.dtype, y.stride()):
            return f"it is {x.dtype} {list(x.shape)} with strides {x.stride()}, not {y.dtype} {y.stride()}"
        bits = _BITS[x.element_size()]
        if not torch.equal(x.view(bits), y.view(bits)):
            count, most = int((x.view(bits) != y.view(bits)).sum()), float((x.double() - y.double()).abs().max())
            return f"{count} of {x.numel()} values differ, by up to {most:.3g}"
    return None
