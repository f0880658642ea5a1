"""Which backend runs an op, and why the others do not.

Each op is one torch operator (`torch.ops.ldmfast.<name>`), so that torch.compile, CUDA graphs and autograd see one
opaque call with a fake implementation, autocast rules and a gradient. PyTorch's dispatcher knows the device; it
cannot tell Triton from CUDA C++. That second choice is made here, in `Op.run`:

1. an explicit `backend=` argument, else `use_backend(name)`, else `LDMFAST_BACKEND`: that one or an error;
2. else the highest-ranked backend that does not refuse. A refusal is a sentence. With nothing left, the error lists
   every backend's sentence.

An op's gradient is an op of its own, `<name>_backward`, chosen in the same way: autograd calls it with the name that
the forward was given, if any. Autograd differentiates the reference's formula instead where the choice is `torch`, for
a second derivative, and for an input that the backward op has no gradient for (its file says which).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from ldmfast.ops.dispatcher import dispatcher_needed

LIBRARY = torch.library.Library("ldmfast", "DEF")
OPS: dict[str, Op] = {}  # what a user calls, by name
BACKWARD_OPS: dict[str, Op] = {}  # what autograd calls, by its own name
BACKENDS = ("cuda", "triton", "cpu", "torch")  # what a user may name; `cuda-host` joins them in tests
RANKS = {"cuda": 3, "triton": 2, "cpu": 2, "torch": 0, "cuda-host": -1}  # below 0: only when named

_chosen: list[str] = []  # LDMFAST_BACKEND as it was at import, if set; the innermost use_backend is last


class use_backend:  # noqa: N801 - used as a function and as a context manager, as torch.no_grad is
    """Run every op with this backend: until the end of the `with` block, or for good when called as a statement.

    The setting is process-wide (autograd calls ops from threads of its own). An op that the backend refuses raises
    NotImplementedError with the reason; it never falls back.

    Raises ValueError for a name that no op has.
    """

    def __init__(self, name: str):
        require_backend_name(name, "use_backend")
        self.name = name
        _chosen.append(name)

    def __enter__(self) -> use_backend:
        return self

    def __exit__(self, *exc) -> None:
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

    def refuses(self, condition: Callable) -> Callable:
        """Decorator: `condition(*args)` returns a sentence, or None where the backend can run these arguments."""
        self.conditions.append(condition)
        return condition

    def takes(self, device: str) -> bool:
        return self.devices is None or device in self.devices

    def refusal(self, args: Sequence) -> str | None:
        device = args[0].device.type
        if not self.takes(device):
            return f"runs on {' and '.join(sorted(self.devices))} tensors, not {device}"
        return self.reason(args)

    def reason(self, args: Sequence) -> str | None:
        """The refusal, where the device is one that it takes."""
        for condition in self.conditions:
            if reason := condition(*args):
                return reason
        return None


class Op:
    """One op: its contract (schema and checks), its backends, and its torch operator.

    name        the operator's name in torch.ops.ldmfast
    schema      its arguments and results without the name; a last argument `str? backend` is added
    check       called as check(*args) before any backend and in the fake implementation; raises on bad input
    fake        called as fake(*args): empty outputs of the right shape, dtype and strides
    autocast    called as autocast(dtype, *args): the arguments as autocast wants them
    normalise   the public function's arguments -> args, for `explain`; None for an op that only autograd calls
    """

    def __init__(self, name, schema, *, check, fake, autocast, normalise=None):
        self.name, self.check, self.fake, self.normalise = name, check, fake, normalise
        self.backends: dict[str, Backend] = {}
        self._ranked: list[Backend] = []
        self._automatic: dict[str, list[Backend]] = {}
        self._autocast = autocast
        self._gradient: Callable | None = None
        self._keeps_output = False
        self._define(schema)
        (BACKWARD_OPS if normalise is None else OPS)[name] = self

    def backend(self, name: str, *, devices: set[str] | None = None) -> Callable[[Callable], Backend]:
        """Decorator: registers `function(*args)` as this op's backend `name`."""

        def register(function: Callable) -> Backend:
            self.backends[name] = Backend(name, None if devices is None else frozenset(devices), function)
            return self.backends[name]

        return register

    def gradient(self, *, keeps_output: bool = False) -> Callable[[Callable], Callable]:
        """Decorator: `function(grads, args, outputs, needed, backend)` is this op's first derivative.

        grads    one tensor an output
        args     as in the schema, without the backend's name
        outputs  what the op returned, where keeps_output asks for it to be kept; else ()
        needed   for each of args, whether its gradient is
        backend  the name that the forward was given, by whatever way, or None
        returns  one gradient (or None where none is needed) for each of args; or None where a gradient is needed that
                 this function does not give: the reference's formula is then differentiated
        """

        def register(function: Callable) -> Callable:
            self._gradient, self._keeps_output = function, keeps_output
            return function

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

    def __call__(self, *args):
        """args as in the schema, the backend's name or None last."""
        if not torch.compiler.is_compiling():
            if not dispatcher_needed(args):
                return self.run(*args)
            if torch.is_grad_enabled() and _only_autograd_watches(args):
                return _Recorded.apply(*args, self)
        return self._operator(*args)

    def run(self, *args):
        """Check, choose and run: what the operator does on every device."""
        *args, name = args
        self.check(*args)
        return self.select(args, name).run(*args)

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
        for backend in self.automatic(args[0].device.type):
            if backend.reason(args) is None:
                return backend
        reasons = "; ".join(f"{b.name}: {b.refusal(args)}" for b in self.ranked() if RANKS[b.name] >= 0)
        raise NotImplementedError(f"{self.name}: every backend refuses. {reasons}")

    def _define(self, schema: str) -> None:
        arguments, returns = schema.rsplit("->", 1)
        arguments = arguments.strip().removesuffix(")")
        LIBRARY.define(f"{self.name}{arguments}, str? backend) ->{returns}", tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(self.name, self.run, "CompositeExplicitAutograd")
        name = f"ldmfast::{self.name}"
        torch.library.register_fake(name, self._fake, lib=LIBRARY)
        torch.library.register_autograd(name, self._backward, setup_context=self._save, lib=LIBRARY)
        for key, device in (("AutocastCPU", "cpu"), ("AutocastCUDA", "cuda")):
            LIBRARY.impl(self.name, self._autocast_kernel(key, device), key)
        self._operator = getattr(torch.ops.ldmfast, self.name).default

    def _fake(self, *args):
        *args, name = args
        self.check(*args)
        return self.fake(*args)

    def _autocast_kernel(self, key: str, device: str) -> Callable:
        keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

        def kernel(*args):
            *args, name = args
            args = self._autocast(torch.get_autocast_dtype(device), *args)
            with torch._C._ExcludeDispatchKeyGuard(keys):
                return self._operator(*args, name)

        return kernel

    def _save(self, ctx, inputs, output) -> None:
        tensors = [value if isinstance(value, torch.Tensor) else None for value in inputs]
        ctx.others = [None if isinstance(value, torch.Tensor) else value for value in inputs]
        ctx.others[-1] = ctx.others[-1] or chosen_backend()  # a use_backend block may have ended by the backward pass
        kept = (output if isinstance(output, tuple) else (output,)) if self._keeps_output else ()
        ctx.save_for_backward(*tensors, *kept)

    def _backward(self, ctx, *grads):
        """The fused backward, or where there is none for these arguments, the reference's formula."""
        if self.normalise is None:
            raise NotImplementedError(f"{self.name}: has no derivative; differentiate the forward op twice instead")
        saved, others = ctx.saved_tensors, ctx.others
        args = [other if value is None else value for value, other in zip(saved, others, strict=False)]
        *args, backend = args
        needed = ctx.needs_input_grad[: len(args)]
        found = None
        if self._gradient is not None and not torch.is_grad_enabled():
            found = self._gradient(grads, args, saved[len(others) :], needed, backend)
        if found is None:
            found = self._differentiate(grads, args, needed)
        return *found, None

    def _differentiate(self, grads, args, needed) -> tuple:
        """The reference's formula, recomputed from the saved inputs and differentiated by autograd."""
        second_order = torch.is_grad_enabled()
        # SDPA's fused kernels have no second derivative
        kernels = sdpa_kernel(SDPBackend.MATH) if second_order else contextlib.nullcontext()
        with torch.enable_grad(), torch.autocast(args[0].device.type, enabled=False), kernels:
            inputs = list(args)
            for i in (i for i, wanted in enumerate(needed) if wanted):
                # a view keeps the way back to the input for a second derivative
                inputs[i] = args[i].view_as(args[i]) if second_order else args[i].detach().requires_grad_()
            outputs = self.reference(*inputs)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            wanted = [value for value, is_wanted in zip(inputs, needed, strict=True) if is_wanted]
            pairs = [pair for pair in zip(outputs, grads, strict=True) if pair[0].requires_grad and pair[1] is not None]
            outputs, grads = zip(*pairs, strict=True)
            found = iter(torch.autograd.grad(outputs, wanted, grads, create_graph=second_order, allow_unused=True))
        return tuple(next(found) if is_wanted else None for is_wanted in needed)


def _only_autograd_watches(args) -> bool:
    with torch.no_grad():
        return not dispatcher_needed(args)


class _Recorded(torch.autograd.Function):
    """An op's call with its gradient, without the way through PyTorch's dispatcher and torch.library."""

    @staticmethod
    def forward(ctx, *args):
        *args, op = args
        output = op.run(*args)
        op._save(ctx, args, output)
        ctx.op = op
        return output

    @staticmethod
    def backward(ctx, *grads):
        return *ctx.op._backward(ctx, *grads), None


def explain(op, *args, **kwargs) -> str:
    """What each backend says to these arguments, and which one would run. Runs nothing.

    op is a function of ldmfast.ops (or its name); args and kwargs are that function's. Bad arguments are reported as
    they would be raised.
    """
    op = OPS[op] if isinstance(op, str) else op.op
    name = kwargs.pop("backend", None) or chosen_backend()
    lines = [f"{op.name}:"]
    try:
        arguments = op.normalise(*args, **kwargs)
        op.check(*arguments)
    except (TypeError, ValueError) as error:
        return f"{lines[0]} the arguments are refused: {error}"
    taken = None
    for backend in op.ranked():
        reason = backend.refusal(arguments)
        if reason is None and taken is None and (name == backend.name or name is None and RANKS[backend.name] >= 0):
            taken = backend.name
            lines.append(f"  {backend.name:<10} runs" + (" (asked for)" if name else ""))
        else:
            lines.append(f"  {backend.name:<10} " + (f"refuses: {reason}" if reason else "could run"))
    if taken is None:
        lines.append("  nothing runs: " + (f"backend {name} was asked for" if name else "every backend refuses"))
    return "\n".join(lines)
