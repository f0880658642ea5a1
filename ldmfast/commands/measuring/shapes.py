"""The calls that a network makes of the ops: found by a pass in which every op only gives an output of its shape."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ldmfast.commands.measuring.clock import LAUNCHES
from ldmfast.commands.measuring.works import Work
from ldmfast.ops.operator import Op
from ldmfast.ops.registry import OPS


@dataclass(frozen=True)
class Like:
    """A tensor's shape, strides and dtype."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    def tensor(self, device: str) -> torch.Tensor:
        found = torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=device)
        if self.dtype.is_floating_point:
            return found.normal_()
        return found.fill_(True) if self.dtype is torch.bool else found.random_(0, 1000)


@dataclass(frozen=True)
class Call:
    """An op's arguments, its tensors as Like; `dtype` and `sizes` are what its time is filed under."""

    op: Op
    args: tuple
    dtype: str
    sizes: dict[str, int]

    @property
    def key(self) -> tuple:
        return (self.op.name, self.dtype, *self.sizes.items())

    def tensors(self, device: str) -> list[Any]:
        torch.manual_seed(0)
        return [value.tensor(device) if isinstance(value, Like) else value for value in self.args]

    def launches(self, device) -> int:
        """On a GPU many, so that one launch is measured without the host's share; a processor needs one."""
        return LAUNCHES if device.kind == "cuda" else 1


def calls(name: str, dtype: torch.dtype, device: str, options) -> Iterator[Call]:
    """The calls of one pass of a work's network, each shape once, and of every other op its example.

    Ops that no figures are kept of are left out.
    """
    found: dict[tuple, Call] = {}
    with _noted(found), torch.inference_mode():
        work = Work(name, dtype, device, options.tiny, options.batch)
        work.side = options.size or work.side
        work.ours = work.shaped()
        work.passed()
    seen = {call.op.name for call in found.values()}
    for op in OPS.values():
        if op.sizes is not None and op.name not in seen:
            call = noted(op, op.example(dtype, "cpu"))
            found[call.key] = call
    yield from found.values()


def noted(op: Op, args) -> Call:
    like = (_like(value) if isinstance(value, torch.Tensor) else value for value in args)
    sizes = {name: int(value) for name, value in op.sizes(*args).items()}
    return Call(op, tuple(like), str(args[op.lead].dtype).removeprefix("torch."), sizes)


def _like(value: torch.Tensor) -> Like:
    """A parameter of works.shaped has no strides of its own: it is taken for contiguous."""
    strides = value.stride() if any(value.stride()) else torch.empty(value.shape, device="meta").stride()
    return Like(tuple(value.shape), strides, value.dtype)


@contextlib.contextmanager
def _noted(found: dict[tuple, Call]) -> Iterator[None]:
    """Context in which each op's arguments are noted, and its output is empty memory of the right shape."""
    before = Op.__call__

    def note(op, *args):
        if op.sizes is not None:
            call = noted(op, args[:-1])
            found.setdefault(call.key, call)
        return op.fake(*args[:-1])

    Op.__call__ = note
    try:
        yield
    finally:
        Op.__call__ = before
