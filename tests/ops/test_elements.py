"""A NaN in an input is in the output wherever the reference has one: no clamp or maximum makes a number of it."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, backward_inputs, tuples
from test_ops_numbers import refusal

from ldmfast.ops.registry import BACKWARD_OPS, OPS

LABELS = {
    "group_norm_silu": ("everything-contiguous", "everything-channels_last"),
    "attention": ("mask-additive", "mask-keys", "self-67x40", "blocks-97x300x40"),
    "timestep_mlp": ("odd",),
    "ddim_step": ("clip", "noise"),
}
CHOSEN = [case for case in CASES if case.label in LABELS.get(case.op, ())]


def with_nan(arguments):
    """(index, the arguments with a NaN in one element of the tensor at index), for each floating tensor."""
    for index, value in enumerate(arguments):
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel():
            spoiled = value.clone()
            spoiled[tuple(size // 2 for size in spoiled.shape)] = float("nan")
            yield index, [*arguments[:index], spoiled, *arguments[index + 1 :]]


def lost(reference, ours):
    """Whether a NaN of the reference's is a number here."""
    return bool((reference.isnan() & ~ours.isnan()).any())


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32], ids=lambda dtype: str(dtype).removeprefix("torch.")
)
@pytest.mark.parametrize("backend", ["cpu", "cuda-host"])
@pytest.mark.parametrize("case", CHOSEN, ids=lambda case: f"{case.op}-{case.label}")
def test_a_nan_stays(case, backend, dtype):
    if reason := refusal(case, dtype, backend):
        pytest.skip(f"{backend}: {reason}")
    args, kwargs = case.make(dtype)
    op = OPS[case.op]
    for index, arguments in with_nan(op.normalise(*args, **kwargs)):
        for exact, y in zip(
            tuples(op.reference(*arguments)), tuples(op.backends[backend].run(*arguments)), strict=True
        ):
            assert not lost(exact, y), f"argument {index}"


@pytest.mark.parametrize("backend", ["cpu", "cuda-host"])
def test_a_nan_key_is_in_every_gradient_of_attention(backend):
    case = next(case for case in CASES if case.op == "attention" and case.label == "mask-additive")
    for dtype in (torch.float16, torch.float32):
        if reason := refusal(case, dtype, backend):
            pytest.skip(f"{backend}: {reason}")
        args, kwargs = case.make(dtype)
        q, k, *others = OPS["attention"].normalise(*args, **kwargs)
        k = k.clone()
        k[0, 3, 1, 5] = float("nan")
        backward = BACKWARD_OPS["attention_backward"]
        inputs = backward_inputs("attention", [q, k, *others], [torch.randn_like(q)])
        for exact, y in zip(backward.reference(*inputs), backward.backends[backend].run(*inputs), strict=True):
            assert not lost(exact, y)
