"""Names that profilers show: a range around each op, its gradient and each block of a network.

    with ranges(unet):            NVTX for Nsight Systems and Compute; record_function for torch.profiler
        unet(...)

LDMFAST_RANGES=1 has them from the start, the blocks by their classes. Off, no call is any longer for it: what is to be
named is replaced when they go on. What a CUDA graph or torch.compile recorded before has no ranges.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch.profiler import record_function

from ldmfast.ops.registry import BACKWARD_OPS, OPS

VARIABLE = "LDMFAST_RANGES"
Function = TypeVar("Function", bound=Callable)

_blocks: list[Callable] = []  # functions of a block, whose first argument is its module
_names: dict[int, str] = {}  # of modules, by identity, while `ranges` knows them


def asked_for() -> bool:
    return os.environ.get(VARIABLE, "0") not in ("", "0")


def block(function: Function) -> Function:
    """Decorator of a function whose first argument is a block's module: `ranges` names its calls."""
    if asked_for():
        return _in_range(function, _block_name(function))
    _blocks.append(function)
    return function


class ranges:  # noqa: N801 - a context manager, as torch.no_grad is
    """Context in which ops and blocks are named; a block by its place in one of `models`, else by its class.

    Process-wide, and not to be entered by two threads at once.
    """

    def __init__(self, *models: torch.nn.Module) -> None:
        self.models = models

    def __enter__(self) -> ranges:
        self.undo: list[Callable[[], None]] = []
        for model in self.models:
            _names.update({id(module): name or type(model).__name__ for name, module in model.named_modules()})
        if not asked_for():
            self.undo += [_named_op(op) for op in (*OPS.values(), *BACKWARD_OPS.values())]
            for function in _blocks:
                named = _in_range(function, _block_name(function))
                self.undo += _replaced(function, named)
        return self

    def __exit__(self, *exc: Any) -> None:
        for step in reversed(self.undo):
            step()
        _names.clear()


def name_ops() -> None:
    """Names every op for good: what LDMFAST_RANGES asks for."""
    for op in (*OPS.values(), *BACKWARD_OPS.values()):
        _named_op(op)


def _named_op(op) -> Callable[[], None]:
    """Names the op's runs; returns what takes that back."""
    before = vars(op).get("run")
    op.run = _in_range(op.run, lambda args: f"ldmfast.{op.name}")

    def undo():
        if before is None:
            del op.run
        else:
            op.run = before

    return undo


def _replaced(function: Callable, named: Callable) -> Iterable[Callable[[], None]]:
    """Puts `named` in the place of `function` in every module of this package that has it; what takes that back."""
    package = __name__.partition(".")[0]
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == package and vars(module).get(function.__name__) is function:
            setattr(module, function.__name__, named)
            yield functools.partial(setattr, module, function.__name__, function)


def _block_name(function: Callable) -> Callable[[tuple], str]:
    return lambda args: _names.get(id(args[0]), type(args[0]).__name__)


def _in_range(function: Callable, name_of: Callable[[tuple], str]) -> Callable:
    @functools.wraps(function)
    def named(*args, **kwargs):
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        name = name_of(args)
        with record_function(name):
            if not torch.cuda.is_available():
                return function(*args, **kwargs)
            torch.cuda.nvtx.range_push(name)
            try:
                return function(*args, **kwargs)
            finally:
                torch.cuda.nvtx.range_pop()

    return named
