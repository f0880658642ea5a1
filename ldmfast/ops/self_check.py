"""Every op and its gradient on its example, in every backend that does not refuse, against float64."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from ldmfast.ops.operator import Op
from ldmfast.ops.registry import RANKS, Backend

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def rows(op: Op, dtype: torch.dtype) -> Iterator[tuple[str, bool]]:
    """A line for each backend, and whether it is right; one that refuses is not wrong."""
    for backend in op.ranked():
        if RANKS[backend.name] < 0:
            continue
        args = op.example(dtype, backend.home)
        row = f"{op.name:<16} {str(dtype).removeprefix('torch.'):<9} {backend.name:<7}"
        if reason := backend.refusal(args):
            yield f"{row} refuses: {reason}", True
            continue
        try:
            said, right = _measured(op, backend, args, TOLERANCE[dtype])
        except (TypeError, RuntimeError) as error:  # of a binding that does not fit, or of the device
            said, right = f"{type(error).__name__}: {error}", False
        yield f"{row} {'right' if right else 'WRONG'}: {said}", right


def _measured(op: Op, backend: Backend, args, tolerance: float) -> tuple[str, bool]:
    """The errors in words, and whether they are small enough."""
    error = output_error(op, backend, args)
    said, right = f"error {error:.1e} against float64", error <= tolerance  # NaN is not
    try:
        gradient = gradient_error(op, backend.name, args)
    except NotImplementedError as reason:
        return f"{said}; {reason}", right
    return f"{said}, gradient {gradient:.1e}", right and gradient <= tolerance


def output_error(op: Op, backend: Backend, args: Sequence) -> float:
    """The worst of the outputs' errors, each as ||y - exact|| / ||exact||."""
    exact = op.reference(*(value.double() if _is_float_tensor(value) else value for value in args))
    got = backend.run(*args)
    pairs = zip(*[value if isinstance(value, tuple) else (value,) for value in (got, exact)], strict=True)
    return max(((y.double() - true).norm() / true.norm()).item() for y, true in pairs)


def gradient_error(op: Op, name: str, args: Sequence) -> float:
    """The worst of the gradients of the outputs' sum with random weights. NotImplementedError where there is no kernel.

    Of a LayerNorm's sum of squares, say, there is next to no gradient: its rounding would be all that is compared.
    """

    def gradients(function, args):
        args = [value.detach().requires_grad_() if _is_float_tensor(value) else value for value in args]
        got = function(*args)
        wanted = [value for value in args if _is_float_tensor(value)]
        return torch.autograd.grad([_weighted(y) for y in (got if isinstance(got, tuple) else (got,))], wanted)

    got = gradients(lambda *args: op(*args, name), args)
    exact = gradients(op.reference, [value.double() if _is_float_tensor(value) else value for value in args])
    return max(((g.double() - true).norm() / true.norm()).item() for g, true in zip(got, exact, strict=True))


def _weighted(y: torch.Tensor) -> torch.Tensor:
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (y.double() * weights.to(y.device)).sum()


def _is_float_tensor(value) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()
