"""What a norm over the whole output does not see: single elements, and rows of which little is left.

A NaN in an input is in the output wherever the reference has one: no clamp or maximum makes a number of it.
"""

from __future__ import annotations

import pytest
import torch
from cases import CASES, backward_inputs, tuples
from test_ops_numbers import BACKENDS, refusal

from ldmfast import ops
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


dtypes = pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32], ids=lambda dtype: str(dtype).removeprefix("torch.")
)


@dtypes
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


def run(backend, *calls):
    """What the calls give that this backend runs; skips where it refuses all."""
    found, reason = [], ""
    for call in calls:
        try:
            found.append(call())
        except NotImplementedError as refused:
            reason = str(refused)
    if not found:
        pytest.skip(reason)
    return found


def gelus(values, backend):
    """gelu(values) by each way there is; the layers' product is one number times the weight."""
    one, many = torch.ones(1, 1, dtype=values.dtype), torch.ones(37, 1, dtype=values.dtype)
    gated = torch.cat([torch.ones_like(values), values])
    return run(
        backend,
        lambda: ops.geglu(gated, backend=backend),
        lambda: ops.linear(one, values[:, None], activation="gelu", backend=backend)[0],
        lambda: ops.linear(many, values[:, None], activation="gelu", backend=backend)[-1],
        lambda: ops.linear(many, gated[:, None], activation="geglu", backend=backend)[-1],
    )


every_backend = pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend != "torch"])


@dtypes
@every_backend
def test_gelu_keeps_its_digits_far_below_zero(backend, dtype):
    """1 + erf leaves at -4 four digits of float32, at -5 one: the relative error is that of rounding x, and no more."""
    values = torch.linspace(-5.4, 5.4, 2049).to(dtype)
    exact = 0.5 * values.double() * torch.special.erfc(-values.double() * 0.5**0.5)
    rounding = {torch.float32: 0.0, torch.bfloat16: 2**-8 + 3e-4, torch.float16: 2**-11}[dtype]
    least = 2**-25 if dtype is torch.float16 else 0.0  # half of the smallest number
    bound = (rounding + 4e-7 * (3 + values.double().square())) * exact.abs() + least
    for y in gelus(values, backend):
        off = (y.double() - exact).abs() / bound
        assert off.nan_to_num(nan=0.0 if y.isfinite().all() else torch.inf).max() <= 1  # 0 / 0: gelu(0)


@every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gelu_of_what_is_hardly_a_number(backend, dtype):
    values = torch.tensor([torch.inf, -torch.inf, torch.nan, 1e30, -1e30, 3e4, -3e4, -20.0, 0.0]).to(dtype)
    for y in gelus(values, backend):
        wanted = torch.nn.functional.gelu(values)
        torch.testing.assert_close(y, wanted, rtol=1e-2, atol=1e-30, equal_nan=True)


@dtypes
@every_backend
@pytest.mark.parametrize("K", [7, 320, 1300])
def test_a_row_of_like_elements_is_normalised_to_nothing(K, backend, dtype):
    """A mean that is off by a rounding would be left, times 1 / sqrt(eps)."""
    rows = torch.tensor([3.1, 300.7, -0.77, 1e-3, 4099.0]).to(dtype)[:, None].expand(5, K).contiguous()
    ones, bias, weight = torch.ones(K, dtype=dtype), torch.zeros(K, dtype=dtype), torch.ones(9, K, dtype=dtype)
    found = run(
        backend,
        lambda: ops.layer_norm(rows, ones, bias, 1e-5, backend=backend),
        lambda: ops.residual_layer_norm(rows, torch.zeros_like(rows), ones, bias, 1e-5, backend=backend)[1],
        lambda: ops.linear(rows, weight, layer_norm=(ones, bias, 1e-5), backend=backend),
    )
    for y in found:
        assert not y.any()


@every_backend
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("width, side", [(2, 1), (1, 2), (10, 1), (3, 24)])
def test_a_group_far_from_zero_keeps_its_digits(width, side, layout, backend):
    """Its mean is 190 deviations off: one float32 rounds that by 1e-5 of one, and add - mean by as much."""
    channels = 4 * width
    x, add = torch.randn(2, channels, side, side) * 64 + 19000, torch.randn(2, channels) * 64 - 7000
    x, add = ((values * 512).round() / 512 for values in (x, add))  # so that x + add is a number of float32
    x = x.contiguous(memory_format=layout)
    exact = torch.nn.functional.group_norm(x.double() + add.double()[..., None, None], 4, eps=1e-6)
    (y,) = run(backend, lambda: ops.group_norm_silu(x, None, None, 4, 1e-6, add=add, silu=False, backend=backend))
    assert (y - exact).norm() <= 3e-7 * exact.norm()
