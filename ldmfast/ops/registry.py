"""Which backend runs an op, and why the others do not.

PyTorch's dispatcher knows the device; it cannot tell Triton from CUDA C++. That choice is made here, in
`Choice.select`:

1. an explicit `backend=` argument, else `use_backend(name)`, else `LDMFAST_BACKEND`: that one or an error;
2. else the highest-ranked backend that neither refuses nor is known to be slower here (under `exact`, on a CPU, the
   highest-ranked that does not refuse);
3. else the highest-ranked backend that does not refuse.

A refusal is a sentence, and so is "slower here" (speeds.py has the figures). With nothing left, the error lists every
backend's refusal. How torch sees an op is operator.py's business.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ldmfast.ops.contract.switch import chosen_numerics, exact

# each an Op of operator.py, which stands on this file
OPS: dict[str, Choice] = {}  # what a user calls, by name
BACKWARD_OPS: dict[str, Choice] = {}  # what autograd calls, by its own name
# below 0: only when named, in tests
RANKS = {"cuda": 3, "triton": 2, "cpu": 2, "sdpa": 1, "cudnn": 1, "torch": 0, "cuda-host": -1}
BACKENDS = tuple(name for name, rank in RANKS.items() if rank >= 0)  # what a user may name

_chosen: list[str] = []  # LDMFAST_BACKEND as it was at import, if set; the innermost use_backend is last


class use_backend:  # noqa: N801 - used as a function and as a context manager, as torch.no_grad is
    """Run every op with this backend: until the end of the `with` block, or for good when called as a statement.

    The setting is process-wide (autograd calls ops from threads of its own). An op that the backend refuses raises
    NotImplementedError with the reason; it never falls back.

    Raises ValueError for a name that no op has.
    """

    def __init__(self, name: str) -> None:
        require_backend_name(name, "use_backend")
        self.name = name
        _chosen.append(name)

    def __enter__(self) -> use_backend:
        return self

    def __exit__(self, *exc: Any) -> None:
        del _chosen[len(_chosen) - 1 - _chosen[::-1].index(self.name)]


def require_backend_name(name: str, where: str) -> None:
    if name not in RANKS:
        raise ValueError(f"{where}: unknown backend {name!r}; known: {', '.join(BACKENDS)}")


def chosen_backend() -> str | None:
    """The backend that the user named, by use_backend or LDMFAST_BACKEND, or None."""
    return _chosen[-1] if _chosen else None


if _name := os.environ.get("LDMFAST_BACKEND"):  # read once: looking it up costs a fifth of a small op's call
    require_backend_name(_name, "LDMFAST_BACKEND")
    _chosen.append(_name)


@dataclass
class Backend:
    """One implementation of one op. `refusal(args)` is None, or the sentence that says why it cannot run them."""

    name: str
    devices: frozenset[str] | None  # None: any
    run: Callable
    conditions: list[Callable] = field(default_factory=list)
    slow_conditions: list[Callable] = field(default_factory=list)
    # by `run`, what native.py calls in its place as function(args): the result, and a plan or None
    planned: dict[Callable, Callable] = field(default_factory=dict)
    plans: dict = field(
        default_factory=dict, repr=False, compare=False
    )  # the op's, which end where one of these changes

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if hasattr(self, "plans"):
            self.plans.clear()

    def first(self, args: Sequence) -> tuple[Any, Callable]:
        """The result, and the plan of all calls of this signature: a function of the op's arguments, the name last."""
        run = self.run
        result, plan = self.planned[run](args) if run in self.planned else (run(*args), None)
        return result, plan or (lambda args: run(*args[:-1]))

    def refuses(self, condition: Callable) -> Callable:
        """Decorator: `condition(*args)` returns a sentence, or None where the backend can run these arguments."""
        self.conditions.append(condition)
        self.plans.clear()
        return condition

    def slower(self, condition: Callable) -> Callable:
        """Decorator: `condition(*args)` returns a sentence where another backend is known to be faster, or None.

        It is not asked about arguments that the backend refuses, nor when the backend was named.
        """
        self.slow_conditions.append(condition)
        self.plans.clear()
        return condition

    @property
    def home(self) -> str:
        """The kind of device to try it on: a GPU where it is written for one and there is one."""
        return "cuda" if self.devices and "cuda" in self.devices and torch.cuda.is_available() else "cpu"

    def takes(self, device: str) -> bool:
        return self.devices is None or device in self.devices

    def refusal(self, args: Sequence) -> str | None:
        device = args[0].device.type
        if not self.takes(device):
            return f"runs on {' and '.join(sorted(self.devices))} tensors, not {device}"
        return self.reason(args)

    def reason(self, args: Sequence) -> str | None:
        """The refusal, where the device is one that it takes."""
        return _first_sentence(self.conditions, args)

    def slowness(self, args: Sequence) -> str | None:
        """Why another backend is the better choice, for arguments that this one can run."""
        return _first_sentence(self.slow_conditions, args)


def _first_sentence(conditions: list[Callable], args: Sequence) -> str | None:
    for condition in conditions:
        if sentence := condition(*args):
            return sentence
    return None


class Plans(dict[tuple, Callable]):
    """How calls are made, by what operator.py sees of them; in `noted` once more, by what is found sooner."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: dict[tuple, list] = {}

    def clear(self) -> None:
        super().clear()
        self.noted.clear()


class Choice:
    """An op's backends, and the choice between them."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.backends: dict[str, Backend] = {}
        self.plans = Plans()
        self.sizes: Callable[..., dict[str, int]] | None = None  # of args, that times depend on (speeds.py)
        self.lead = 0  # the argument whose dtype and device the times are of
        self.origin: Callable[[Sequence], str] | None = None  # where the choice for args comes from
        self._ranked: list[Backend] = []
        self._automatic: dict[str, list[Backend]] = {}

    def backend(self, name: str, *, devices: set[str] | None = None) -> Callable[[Callable], Backend]:
        """Decorator: registers `function(*args)` as this op's backend `name`."""

        def register(function: Callable) -> Backend:
            devices_taken = None if devices is None else frozenset(devices)
            self.backends[name] = Backend(name, devices_taken, function, plans=self.plans)
            self.plans.clear()
            return self.backends[name]

        return register

    @property
    def reference(self) -> Callable:
        return self.backends["torch"].run

    def fused(self, args: Sequence, name: str | None) -> bool:
        """Whether a kernel, not the reference, would run; raises as `select` does."""
        return self.select(args, name).name != "torch"

    def ranked(self) -> list[Backend]:
        """Best first."""
        if len(self._ranked) != len(self.backends):
            self._ranked = sorted(self.backends.values(), key=lambda backend: -RANKS[backend.name])
        return self._ranked

    def automatic(self, device: str) -> list[Backend]:
        """Those that are tried on this kind of device when none is named, best first."""
        if device not in self._automatic:
            self._automatic[device] = [b for b in self.ranked() if RANKS[b.name] >= 0 and b.takes(device)]
        return self._automatic[device]

    def best(self, args: Sequence) -> Backend | None:
        """The backend that runs these arguments when none is named, or None if every one refuses."""
        slow, lenient = None, exact() and args[0].device.type == "cpu"  # there, speed may ask for the size of the batch
        for backend in self.automatic(args[0].device.type):
            if backend.reason(args) is None:
                if lenient or backend.slowness(args) is None:
                    return backend
                slow = slow or backend
        return slow

    def select(self, args: Sequence, name: str | None = None) -> Backend:
        """The backend for these arguments.

        Raises ValueError for an unknown name, NotImplementedError with the reason of each backend that refuses.
        """
        name = name or chosen_backend()
        if name is not None:
            require_backend_name(name, self.name)
            if name not in self.backends:
                raise NotImplementedError(f"{self.name}: backend {name} refuses: it has no such kernel")
            backend = self.backends[name]
            if reason := backend.refusal(args):
                raise NotImplementedError(f"{self.name}: backend {name} refuses: {reason}")
            return backend
        if backend := self.best(args):
            return backend
        reasons = "; ".join(f"{b.name}: {b.refusal(args)}" for b in self.ranked() if RANKS[b.name] >= 0)
        raise NotImplementedError(f"{self.name}: every backend refuses. {reasons}")


def choose_anew() -> None:
    """To be called where something that a choice rests on has changed: a table of times, say."""
    for op in (*OPS.values(), *BACKWARD_OPS.values()):
        op.plans.clear()


def explain(op: Callable | str, *args: Any, **kwargs: Any) -> str:
    """What each backend says to these arguments, and which one would run. Runs nothing.

    op is a function of ldmfast.ops (or its name); args and kwargs are that function's. Bad arguments are reported as
    they would be raised.
    """
    op = OPS[op] if isinstance(op, str) else op.op
    name = kwargs.pop("backend", None) or chosen_backend()
    lines = [f"{op.name} (numerics: {chosen_numerics()}):"]
    try:
        arguments = op.normalise(*args, **kwargs)
        op.require_tensors(arguments)
        op.check(*arguments)
    except (TypeError, ValueError) as error:
        return f"{op.name}: the arguments are refused: {error}"
    taken = op.best(arguments) if name is None else op.backends.get(name)
    runs = False
    for backend in op.ranked():
        if said := backend.refusal(arguments):
            said = f"refuses: {said}"
        else:
            said = "could run"
            if backend is taken:
                said, runs = "runs" + (" (asked for)" if name else ""), True
            if slow := backend.slowness(arguments):
                said += f", slower here: {slow}"
        lines.append(f"  {backend.name:<10} {said}")
    if runs and not name and op.origin:
        lines.append(f"  chosen by {op.origin(arguments)}")
    if not runs:
        lines.append("  nothing runs: " + (f"backend {name} was asked for" if name else "every backend refuses"))
    return "\n".join(lines)
