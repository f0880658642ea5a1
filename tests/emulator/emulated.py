"""Calls of the CUDA kernels in the emulator (csrc/cuda/emulator), under its settings, each held to its error budget."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "ops"), str(TESTS.parent)]  # for a run as a script

import torch  # noqa: E402
from case import Case  # noqa: E402
from cases import CASES, DTYPES, FLOOR, backward_inputs, exactly, relative_error, tuples  # noqa: E402

from ldmfast.ops.registry import BACKWARD_OPS, OPS  # noqa: E402

BACKEND = "cuda-host"
PREFIX = "LDMFAST_CUDA_HOST_"
NO_CLUSTERS = (("ARCH", "80"),)  # A100, RTX 3090 and 4090
SLABS = (("ARCH", "80"), ("SLAB", "256"), ("BLOCKS", "64"))  # GroupNorm in two launches, several slabs a block


@dataclass(frozen=True)
class Call:
    """One op, or its gradient, on a case's inputs."""

    case: Case
    dtype: torch.dtype
    backward: bool = False
    settings: tuple[tuple[str, str], ...] = ()  # of the emulator, beside those of the run

    def __str__(self) -> str:
        named = "".join(f" {name}={value}" for name, value in self.settings)
        return f"{self.op} {self.case.label} {str(self.dtype).removeprefix('torch.')}{named}"

    @property
    def op(self) -> str:
        return self.case.op + "_backward" * self.backward


def calls(case: Case, dtypes=DTYPES, gradient: bool = True) -> Iterator[Call]:
    """The op's and its gradient's, in each dtype that the emulated kernels take."""
    return (call for call in _named(case, dtypes, gradient) if refused(call) is None)


def _named(case: Case, dtypes, gradient: bool) -> Iterator[Call]:
    for dtype in dtypes:
        for backward in (False, True)[: 1 + (gradient and f"{case.op}_backward" in BACKWARD_OPS)]:
            yield Call(case, dtype, backward)


def every_call(only: Sequence[str] = ("",)) -> Iterator[Call]:
    """All cases but the big ones, refused ones too; GroupNorm also on a chip without clusters and with several slabs.

    only  calls with one of these in their names
    """
    for case in CASES:
        for call in _named(case, DTYPES, True) if not case.big else ():
            ways = [()]
            if case.op == "group_norm_silu":
                ways += [SLABS] if call.backward else [NO_CLUSTERS, SLABS]
            yield from (
                c for c in (replace(call, settings=way) for way in ways) if any(part in str(c) for part in only)
            )


def failure(call: Call, **settings: str | None) -> str | None:
    """What is wrong with the call under the settings: the emulator's error, or an error above the budget; or None."""
    arguments, exact, budgets = _prepared(replace(call, settings=()))
    op = BACKWARD_OPS[call.op] if call.backward else OPS[call.op]
    with settings_of(**dict(call.settings), **settings):
        try:
            outputs = tuples(op.backends[BACKEND].run(*arguments))
        except RuntimeError as error:
            return str(error)
    for number, (y, true, budget) in enumerate(zip(outputs, exact, budgets, strict=True)):
        if true is None or y is None:
            continue
        error = _error(y, true)
        if not error <= budget:
            return f"output {number}: error {error:.1e}, budget {budget:.1e}"
    return None


@contextlib.contextmanager
def settings_of(**settings: str | None) -> Iterator[None]:
    """The emulator's settings: LDMFAST_CUDA_HOST_<name>."""
    before = {name: os.environ.get(PREFIX + name) for name in settings}
    _set(settings)
    try:
        yield
    finally:
        _set(before)


def _set(settings) -> None:
    for name, value in settings.items():
        if value is None:
            os.environ.pop(PREFIX + name, None)
        else:
            os.environ[PREFIX + name] = value


@functools.lru_cache(maxsize=64)
def _prepared(call: Call):
    """(arguments, exact outputs, the budget of each output's error)"""
    torch.manual_seed(sum(map(ord, call.case.label)))
    args, kwargs = call.case.make(call.dtype)
    arguments = OPS[call.case.op].normalise(*args, **kwargs)
    op = OPS[call.case.op]
    if call.backward:
        grads = [torch.randn_like(out) for out in tuples(op.reference(*arguments))]
        arguments = backward_inputs(call.case.op, arguments, grads)
        op = BACKWARD_OPS[f"{call.case.op}_backward"]
    same = tuples(op.reference(*arguments))
    exact = tuples(op.reference(*exactly(arguments)))
    # an output that is zero but for rounding is held to the others' size
    largest = max((true.norm().item() for true in exact if true is not None), default=0.0)
    budgets = []
    for y, true in zip(same, exact, strict=True):
        if true is None:
            budgets.append(None)
            continue
        slack = max(1.0, 0.01 * largest / (true.norm().item() or 1.0))
        budgets.append(2 * _error(y, true) + FLOOR[call.dtype] * slack)
    return arguments, exact, budgets


def _error(y, true) -> float:
    return relative_error(y, true) if y.numel() else 0.0


def refused(call: Call) -> str | None:
    """Why no emulated kernel takes the call, or None."""
    name = call.case.op
    op = BACKWARD_OPS.get(call.op) if call.backward else OPS[name]
    if op is None or BACKEND not in op.backends:
        return "it has no such kernel"
    if call.backward and name == "ddim_step":
        args, kwargs = call.case.make(call.dtype)
        if kwargs.get("row") is not None or kwargs.get("weights"):
            return "autograd reads the table's rows first, and takes the formula beside a history"
    return op.backends[BACKEND].refusal(_prepared(replace(call, settings=()))[0])
