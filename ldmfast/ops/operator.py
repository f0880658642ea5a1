"""How torch sees an op: an operator with a fake implementation, autocast rules and a gradient.

Each op is one torch operator (`torch.ops.ldmfast.<name>`), so that torch.compile, CUDA graphs and autograd see one
opaque call. Which backend runs it is registry.py's business.

An op's gradient is an op of its own, `<name>_backward`, chosen in the same way: autograd calls it with the name that
the forward was given, if any. Autograd differentiates the reference's formula instead where the choice is `torch`, for
a second derivative, and for an input that the backward op has no gradient for (its file says which).

Forward-mode AD and torch.func's transforms (grad, vjp, jvp, vmap) go through the reference's formula whichever backend
is chosen, named or not: a kernel sees neither tangents nor a hidden batch. A named backend is still asked, and refuses
as ever.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from ldmfast.ops.checks import require_tensors
from ldmfast.ops.contract.stock_ops import fixed_order
from ldmfast.ops.contract.switch import exact
from ldmfast.ops.dispatcher import SeenCalls, Values, dispatcher_needed, signature, transformed
from ldmfast.ops.registry import BACKWARD_OPS, OPS, Backend, Choice, chosen_backend

PLANS = 1024  # of an op; one more, and they are made anew
LIBRARY = torch.library.Library("ldmfast", "DEF")
_is_traced = torch.compiler.is_dynamo_compiling  # by other tracers' modes `signature` knows them; at half the cost


class Op(Choice):
    """One op: its contract (schema and checks), its torch operator, and the choice between its backends.

    name        the operator's name in torch.ops.ldmfast
    schema      its arguments and results without the name; a last argument `str? backend` is added
    check       called as check(*args) before any backend and in the fake implementation; raises on bad input
    fake        called as fake(*args): empty outputs of the right shape, dtype and strides
    autocast    called as autocast(dtype, *args): the arguments as autocast wants them
    normalise   the public function's arguments -> args, for `explain`; None for an op that only autograd calls
    example     called as example(dtype, device): args on a shape of the U-Net, on which the op is tried; None as above
    numbers     the place of the argument whose numbers, however many, only the kernel looks at, if there is one
    """

    def __init__(
        self,
        name: str,
        schema: str,
        *,
        check: Callable,
        fake: Callable,
        autocast: Callable,
        normalise: Callable | None = None,
        example: Callable | None = None,
        numbers: int | None = None,
    ) -> None:
        super().__init__(name)
        self.check, self.fake, self.normalise, self.example = check, fake, normalise, example
        self._autocast, self._numbers = autocast, numbers
        self._seen = SeenCalls(numbers)
        self._gradient: Callable | None = None
        self._keeps_output = False
        names = schema.partition("->")[0].strip(" ()").split(", ")  # `Tensor? mask`: mask may be None
        found = ((place, re.fullmatch(r"Tensor(\??) (\w+)", name)) for place, name in enumerate(names))
        self._tensors = [(place, match[2] + "_" * len(match[1])) for place, match in found if match]
        self._define(schema)
        (BACKWARD_OPS if normalise is None else OPS)[name] = self

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

    def __call__(self, *args: Any) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """args as in the schema, the backend's name or None last."""
        if _is_traced():
            self.require_tensors(args)
            return self._operator(*args)
        if self._numbers is not None and type(args[self._numbers]) is not Values:
            args = (*args[: self._numbers], Values(args[self._numbers]), *args[self._numbers + 1 :])
        setting, key = (chosen_backend(), exact()), None
        if "run" not in self.__dict__:
            key, plan = self._seen.look(self.plans.noted, args, setting)
            if plan is not None:
                return plan(args)
        seen = signature(args)
        if seen is not None and "run" not in self.__dict__:
            plan = self.plans.get((seen, *setting))
            if plan is not None:
                if key is not None:
                    self._seen.note(self.plans.noted, key, args, plan)
                return plan(args)
        self.require_tensors(args)
        if seen is not None:
            return self._run_seen(seen, args)
        if torch.is_grad_enabled() and _only_autograd_watches(args):
            return _Recorded.apply(*args, self, self._run_below)
        return self._operator(*args)

    def require_tensors(self, args: Sequence) -> None:
        """Raises TypeError where an argument is no tensor that the schema has as one. Arguments with a plan are."""
        require_tensors(self.name, **{name: args[place] for place, name in self._tensors})

    def _run_seen(self, seen: tuple, args: tuple) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """`run`, by the plan that the first call of this signature left: nothing is checked or chosen again."""
        if "run" in self.__dict__:  # who puts another run in its place wants every call
            return self.run(*args)
        key = seen, chosen_backend(), exact()
        plan = self.plans.get(key)
        if plan is not None:
            return plan(args)
        if args[0].is_meta:
            return self._operator(*args)
        if not seen:
            return self.run(*args)
        backend = self._checked(args)
        if backend.name == "torch" and exact():
            return self.run(*args)
        result, plan = backend.first(args[:-1])
        if len(self.plans) >= PLANS:
            self.plans.clear()
        self.plans[key] = plan
        return result

    def _run_below(self, *args: Any) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """The value, for autograd, which has noted the call and looks no further."""
        return self._run_seen(signature(args) or (), args)

    def run(self, *args: Any) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Check, choose and run: what the operator does on every device."""
        backend = self._checked(args)
        if backend.name == "torch" and exact():
            with fixed_order():
                return backend.run(*args[:-1])
        return backend.run(*args[:-1])

    def _checked(self, args: tuple) -> Backend:
        *args, name = args
        self.check(*args)
        return self.select(args, name)

    def _define(self, schema: str) -> None:
        arguments, returns = schema.rsplit("->", 1)
        arguments = arguments.strip().removesuffix(")")
        LIBRARY.define(f"{self.name}{arguments}, str? backend) ->{returns}", tags=(torch.Tag.pt2_compliant_tag,))
        # looked up at each call: measured/ranges.py puts a named run in its place
        LIBRARY.impl(self.name, lambda *args: self.run(*args), "CompositeExplicitAutograd")
        name = f"ldmfast::{self.name}"
        torch.library.register_fake(name, self._fake, lib=LIBRARY)
        LIBRARY.impl(self.name, self._autograd_kernel, "Autograd", with_keyset=True)
        LIBRARY.impl(self.name, self._formula, "FuncTorchBatchedDecomposition")  # vmap
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

    def _autograd_kernel(self, keyset, *args):
        """What stands between autograd and the op, for reverse mode, forward mode and torch.func's layers of both."""
        if transformed():
            return self._formula(*args)

        def below(*args):
            with torch._C._AutoDispatchBelowAutograd():
                return self._operator.redispatch(keyset & torch._C._after_autograd_keyset, *args)

        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return _Recorded.apply(*args, self, below)
        return below(*args)

    def _formula(self, *args):
        """The reference's formula, for PyTorch to transform operation by operation."""
        *args, name = args
        self.check(*args)
        if name or chosen_backend():
            self.select(args, name)  # raises if it refuses
        device = args[0].device.type
        if torch.is_autocast_enabled(device):  # vmap comes before autocast
            args = self._autocast(torch.get_autocast_dtype(device), *args)
        # SDPA's fused kernels have no forward mode and no second derivative
        with torch.autocast(device, enabled=False), sdpa_kernel(SDPBackend.MATH):
            return self.reference(*args)

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
        plain = not (torch.is_grad_enabled() or transformed() or any(map(_batched, grads)))
        if self._gradient is not None and plain:
            found = self._gradient(grads, args, saved[len(others) :], needed, backend)
        if found is None:
            found = self._differentiate(grads, args, needed, plain)
        return *found, None

    def _differentiate(self, grads, args, needed, plain) -> tuple:
        """The reference's formula, recomputed from the saved inputs and differentiated by autograd.

        plain  neither is there a second derivative, nor does a transform watch
        """
        second_order = torch.is_grad_enabled()
        # SDPA's fused kernels have no second derivative, no forward mode and no batched gradient
        kernels = contextlib.nullcontext() if plain else sdpa_kernel(SDPBackend.MATH)
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


def _batched(grad) -> bool:
    """Whether it is a row of gradients, by the older vmap of torch.autograd.grad(is_grads_batched=True)."""
    return grad is not None and torch._C._functorch.is_legacy_batchedtensor(grad)


class _Recorded(torch.autograd.Function):
    """An op's call with its gradient. The last two arguments: the op, and what computes its value from the others."""

    @staticmethod
    def forward(ctx, *args):
        *args, op, compute = args
        output = compute(*args)
        op._save(ctx, args, output)
        ctx.op = op
        return output

    @staticmethod
    def backward(ctx, *grads):
        return *ctx.op._backward(ctx, *grads), None, None
