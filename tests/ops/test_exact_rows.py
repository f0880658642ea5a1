"""The contract `exact`, an op at a time: a sample of a batch has the bits that it has alone, at any number of threads.

Shapes are odd, small ones whose rows or pixels would take a form of their own among them. The other instruction sets
run this file, too (test_instruction_sets.py).
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from cases import CASES, DTYPES, errors, tuples

import ldmfast
from ldmfast import ops
from ldmfast.ops.registry import BACKWARD_OPS, OPS

N = 5


@pytest.fixture(autouse=True)
def exact():
    threads = torch.get_num_threads()
    with ldmfast.numerics("exact"):
        yield
    torch.set_num_threads(threads)


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


def randn(*shape, dtype, std=1.0):
    return (torch.randn(shape) * std).to(dtype)


def bits(value):
    return [t.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()]) for t in tuples(value)]


def hold(function):
    """function(slice of the samples) gives for all of them what it gives for some, in 1 thread and in 3."""
    torch.set_num_threads(1)
    whole = function(slice(0, N))
    parts = [*(slice(i, i + 1) for i in range(N)), slice(1, 3), slice(0, 4)]
    for threads in (1, 3):
        torch.set_num_threads(threads)
        for part in (slice(0, N), *parts):
            for got, wanted in zip(bits(function(part)), bits(whole), strict=True):
                assert torch.equal(got, wanted[part]), (threads, part)


dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


@dtypes
@pytest.mark.parametrize(
    "M, K, width", [(1, 7, 5), (1, 320, 64), (2, 129, 33), (3, 1000, 17), (7, 64, 40), (90, 1000, 300)]
)
def test_cpu_rows_of_a_linear_layer(M, K, width, dtype):
    x, w, b = randn(N, M, K, dtype=dtype), randn(2 * width, K, dtype=dtype, std=K**-0.5), randn(2 * width, dtype=dtype)
    residual, g = randn(N, M, 2 * width, dtype=dtype), randn(K, dtype=dtype)
    hold(lambda part: ops.linear(x[part], w, b))
    hold(lambda part: ops.linear(x[part], w, b, activation="silu", residual=residual[part], output_scale=0.7))
    hold(lambda part: ops.linear(x[part], w, b, activation="geglu", layer_norm=(g, g, 1e-5)))
    hold(lambda part: ops.linear(x[part], w, activation="gelu", layer_norm=(g, None, 1e-5)))
    hold(lambda part: ops.layer_norm(x[part], g, g))


CONVOLUTIONS = [  # C1, C2, Co, H, W, kernel, stride, upsample
    (7, 0, 5, 3, 3, 3, 1, 1),
    (40, 24, 48, 7, 5, 3, 1, 1),
    (64, 0, 32, 4, 4, 3, 1, 2),
    (33, 0, 17, 1, 1, 1, 1, 1),  # a row of a product a sample
    (800, 0, 130, 2, 1, 1, 1, 1),
    (48, 0, 32, 9, 9, 3, 2, 1),
    (4, 0, 64, 8, 8, 3, 1, 1),
    (64, 0, 4, 8, 8, 3, 1, 1),
    (20, 0, 12, 1, 1, 3, 1, 1),
    (64, 32, 130, 11, 8, 1, 1, 1),  # few beside the outputs, whose weights are read in place; all samples are not
    (352, 0, 40, 13, 11, 3, 1, 1),
    (64, 0, 64, 16, 16, 3, 1, 1),  # fast: another of Winograd's forms for another batch
]


@dtypes
@pytest.mark.parametrize("C1, C2, Co, H, W, k, stride, upsample", CONVOLUTIONS)
def test_cpu_samples_of_a_convolution(C1, C2, Co, H, W, k, stride, upsample, dtype):
    Ci = C1 + C2
    x = channels_last(randn(N, C1, H, W, dtype=dtype))
    x2 = channels_last(randn(N, C2, H, W, dtype=dtype)) if C2 else None
    w, b, add = (
        randn(Co, Ci, k, k, dtype=dtype, std=(Ci * k * k) ** -0.5),
        randn(Co, dtype=dtype),
        randn(N, Co, dtype=dtype),
    )
    table = torch.randn(N, Ci), torch.randn(N, Ci)

    def convolved(part, **around):
        second = None if x2 is None else x2[part]
        return ops.conv2d(x[part], w, b, stride=stride, padding=k // 2, x2=second, upsample=upsample, **around)

    residual = convolved(slice(0, N))
    hold(convolved)
    hold(lambda part: convolved(part, residual=residual[part], output_scale=0.7))
    normed = {"norm_silu": True}
    hold(lambda part: convolved(part, add=add[part], norm_scale=table[0][part], norm_shift=table[1][part], **normed))


@dtypes
@pytest.mark.parametrize(
    "L, S, H, D", [(1, 1, 1, 8), (7, 5, 3, 40), (64, 77, 2, 64), (130, 300, 2, 80), (97, 145, 1, 33), (9, 16, 1, 300)]
)
def test_cpu_samples_of_attention(L, S, H, D, dtype):
    q, k, v = (randn(N, n, H, D, dtype=dtype) for n in (L, S, S))
    mask = torch.rand(N, S) > 0.3
    hold(lambda part: ops.attention(q[part], k[part], v[part]))
    hold(lambda part: ops.attention(q[part], k[part], v[part], mask=mask[part]))


@dtypes
@pytest.mark.parametrize(
    "C, H, W, groups", [(32, 3, 3, 4), (320, 8, 8, 32), (48, 1, 1, 8), (36, 5, 7, 3), (64, 33, 17, 32)]
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_cpu_samples_of_group_norm(C, H, W, groups, layout, dtype):
    x, g, more = randn(N, C, H, W, dtype=dtype), randn(C, dtype=dtype), randn(N, C, dtype=dtype)
    x = x.contiguous(memory_format=layout)
    hold(lambda part: ops.group_norm_silu(x[part], g, g, groups, add=more[part], scale=more[part], shift=more[part]))
    hold(lambda part: ops.group_norm_affine(x[part], g, g, groups, scale=more[part], shift=more[part]))
    dy = randn(N, C, H, W, dtype=dtype).contiguous(memory_format=layout)

    def gradients(part):
        others = g, g, groups, 1e-5, True, *[more[part]] * 3, "cpu"
        dx, sums = BACKWARD_OPS["group_norm_silu_backward"](dy[part], x[part], *others)
        return dx, sums.transpose(0, 1).contiguous()  # samples first

    hold(gradients)


@dtypes
@pytest.mark.parametrize("dim, F, E", [(32, 64, 40), (320, 640, 130), (7, 33, 17)])
def test_cpu_rows_of_a_timestep_embedding(dim, F, E, dtype):
    w1, w2, t = randn(F, dim, dtype=dtype, std=0.1), randn(E, F, dtype=dtype, std=0.1), torch.rand(N) * 999
    hold(lambda part: ops.timestep_mlp(t[part], w1, None, w2, None, dim=dim))


@dtypes
@pytest.mark.parametrize("shape", [(3,), (4, 7, 5), (4, 64, 65)])
def test_cpu_samples_of_a_ddim_step(shape, dtype):
    x, noise, output = (randn(*leading, *shape, dtype=dtype) for leading in ((N,), (N,), (2, N)))

    def step(part):
        both = output[:, part].flatten(0, 1)
        return ops.ddim_step(x[part], both, 0.3, 0.5, guidance=3.3, sigma=0.2, noise=noise[part], clip=1.0)

    hold(step)


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_samples_of_the_reference(dtype):
    """Where no kernel runs, torch's own operations keep to the contract: stock_ops.py."""
    x, w, w5 = randn(N, 3, 37, dtype=dtype), randn(21, 37, dtype=dtype), randn(6, 3, 5, 5, dtype=dtype)
    q, g = randn(N, 9, 2, 17, dtype=dtype), randn(37, dtype=dtype)
    picture, t = randn(N, 3, 9, 7, dtype=dtype), torch.rand(N) * 999
    for function in (
        lambda part: ops.linear(x[part], w, activation="silu", layer_norm=(g, g, 1e-5), backend="torch"),
        lambda part: ops.linear(x[part, 0], w, activation="gelu", backend="torch"),
        lambda part: ops.conv2d(picture[part], w5, padding=2, backend="torch"),
        lambda part: ops.attention(q[part], q[part], q[part], backend="torch"),
        lambda part: ops.group_norm_silu(picture[part], None, None, 1, backend="torch"),
        lambda part: ops.group_norm_affine(picture[part], None, None, 3, backend="torch"),
        lambda part: ops.timestep_mlp(t[part], w, None, w.T.contiguous(), None, dim=37, backend="torch"),
    ):
        hold(function)


@dtypes
@pytest.mark.parametrize("op", ["conv2d", "linear"])
def test_exact_products_are_within_the_budget_of_cpu(op, dtype):
    for case in CASES:
        if case.op == op and not case.big and OPS[op].backends["cpu"].refusal(_arguments(case, dtype)) is None:
            error, budget = errors(case, dtype, "cpu")
            assert error <= budget, case.label


def _arguments(case, dtype):
    args, kwargs = case.make(dtype)
    return OPS[case.op].normalise(*args, **kwargs)


_TEAM = """
import torch
from ldmfast import ops
torch.set_num_threads(4)
for M, K, N in ((256, 200, 1056), (136, 40, 600), (200, 1000, 520), (64, 72, 512), (300, 64, 512)):
    x, w = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) for shape in ((M, K), (N, K)))
    product = ops.linear(x, w, backend="cpu")
    torch.testing.assert_close(product, x @ w.T, rtol=1e-4, atol=1e-4)
    picture = x.reshape(1, M // 4, 4, K).permute(0, 3, 1, 2)
    convolved = ops.conv2d(picture, w[:, :, None, None], backend="cpu")
    torch.testing.assert_close(convolved.permute(0, 2, 3, 1).reshape(M, N), product, rtol=1e-4, atol=1e-4)
"""


@pytest.mark.parametrize("limit", [1, 2, 3, 9])
def test_products_by_fewer_threads_than_were_asked_for(limit):
    """As inside another parallel region: OpenMP gives a team as large as it may be."""
    environment = os.environ | {"OMP_THREAD_LIMIT": str(limit)}
    done = subprocess.run([sys.executable, "-c", _TEAM], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_exact_asks_for_no_faster_backend():
    x = channels_last(torch.randn(1, 4, 32, 32))  # which oneDNN convolves faster, so says speeds.py
    said = ops.explain(ops.conv2d, x, torch.randn(8, 4, 3, 3), padding=1)
    assert said.startswith("conv2d (numerics: exact):") and "cpu        runs" in said


def test_the_choice_is_nested_and_undone():
    with ldmfast.numerics("fast"):
        assert ops.chosen_numerics() == "fast"
        with ldmfast.numerics("exact"):
            assert ops.chosen_numerics() == "exact"
        assert ops.explain(ops.linear, torch.ones(1, 2), torch.ones(3, 2)).startswith("linear (numerics: fast):")
    assert ops.chosen_numerics() == "exact"
    with pytest.raises(ValueError, match="numerics: 'slow' is no numerical contract; there are fast and exact"):
        ldmfast.numerics("slow")
