"""bfloat16 attention whose scores are made of integers of 16 bits (csrc/cpu/attention_fixed.h), with AVX2 alone.

Inputs that integers hold and inputs that they do not, which are to be multiplied in float32: right on both sides, and
what is taken depends on the head alone. The other instruction sets pass the same tests (test_instruction_sets.py).
"""

from __future__ import annotations

import math

import pytest
import torch

from ldmfast import ops
from ldmfast.ops import native
from ldmfast.ops.registry import OPS

reference = OPS["attention"].reference
ROWS = 6  # queries that are taken together


def randn(*shape, std=1.0):
    return (torch.randn(shape) * std).bfloat16()


def tensors(L=64, S=77, H=2, D=40, N=1):
    torch.manual_seed(0)
    return [randn(N, L, H, D), randn(N, S, H, D), randn(N, S, H, D)]


def cpu(q, k, v, **kwargs):
    return ops.attention(q, k, v, backend="cpu", **kwargs)


def close(q, k, v, scale=None, mask=None):
    """The error is at most 1.1 times stock's own, head by head: one head's outliers hide nothing of the others."""
    args = OPS["attention"].normalise(q, k, v, scale=scale, mask=mask)
    exact = reference(*(x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in args))
    ours, stock = cpu(q, k, v, scale=scale, mask=mask).double(), reference(*args).double()
    for h in range(q.shape[2]):
        norm = exact[:, :, h].norm()
        mine, theirs = ((y[:, :, h] - exact[:, :, h]).norm() for y in (ours, stock))
        assert mine <= 1.1 * theirs + 1e-4 * norm, (h, (mine / norm).item(), (theirs / norm).item())


def outlier_element(q, k, v):
    k[0, 5, 0, 3], q[0, 6, 1, 0] = 3e4, -2e3


def outlier_key(q, k, v):
    k[0, 11] *= 1e3


def outlier_query(q, k, v):
    q[0, 5] *= 300.0


def huge_and_tiny_keys(q, k, v):
    k[0, ::3] *= 1e-20
    k[0, 1] *= 1e4
    q *= 1e-4


def zeros(q, k, v):
    q[0, 3], k[0, 4], q[0, 4:6] = 0.0, 0.0, -0.0
    k[:, :, 1] = 0.0


def denormal_queries(q, k, v):
    q[0, 3], q[0, 6, 0, 1:] = 1e-39, 0.0


def one_key_counts(q, k, v):
    """A key has most of the weight; the rest is what thousands of small ones have."""
    k[0, 0] = q[0, 0].clone()
    q[0, :] = 2 * q[0, :1]


def values_apart(q, k, v):
    v[0, ::2] *= 1e4


CASES = [
    outlier_element,
    outlier_key,
    outlier_query,
    huge_and_tiny_keys,
    zeros,
    denormal_queries,
    one_key_counts,
    values_apart,
]


@pytest.mark.parametrize("change", CASES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("L, S, D", [(64, 77, 40), (61, 300, 40), (13, 33, 160), (7, 20, 33)])
def test_cpu_numbers_of_unlike_inputs(L, S, D, change):
    given = tensors(L, S, D=D)
    change(*given)
    close(*given)


@pytest.mark.parametrize("D", [1, 2, 7, 40, 64, 80, 160, 191, 192, 193, 256])
@pytest.mark.parametrize("power", [-6, -3, -1, 0, 1, 2, 3, 4, 6])
def test_cpu_numbers_up_to_and_beyond_the_largest_logits(power, D):
    """The bound of a logit's error grows with the scale: somewhere here float32 takes over."""
    q, k, v = tensors(26, 45, D=D)
    close(q, k, v, scale=2.0**power / math.sqrt(D))
    close(q, k, v, scale=-(2.0**power) / math.sqrt(D))


@pytest.mark.parametrize("exponents", [(-120, -120), (-60, 60), (60, -60), (-45, 0), (45, 0), (0, 45), (100, -100)])
def test_cpu_magnitudes_that_a_scale_makes_up_for(exponents):
    q, k, v = tensors(26, 45)
    q, k = q * 2.0 ** exponents[0], k * 2.0 ** exponents[1]
    scale = 2.0 ** -sum(exponents) / math.sqrt(40)
    if scale < 1e38:
        close(q, k, v, scale=scale)
    close(q, k, v)
    close(q, k, v, scale=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("L, S, D", [(26, 45, 40), (13, 700, 40), (9, 300, 160), (7, 20, 33)])
@pytest.mark.parametrize("power", [12, 20, 28, 36, 43, 60])
def test_cpu_logits_whose_rounding_is_beyond_an_exponent(power, L, S, D, dtype):
    """One key has all of the weight. What rounding takes of the largest logit must not stay in the exponents."""
    q, k, v = (x.to(dtype) for x in tensors(L, S, D=D))
    ours = cpu(q, k, v, scale=2.0**power)
    best = torch.einsum("nlhd,nshd->nlhs", q.double(), k.double()).topk(2)
    wanted = torch.stack([v[0, best.indices[0, :, h, 0], h] for h in range(v.shape[2])], 1)[None]
    clear = best.values[..., 0] - best.values[..., 1] > 0.1
    assert clear.float().mean() > 0.8
    torch.testing.assert_close(ours[clear], wanted[clear], rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("kind", ["none", "additive", "boolean"])
def test_cpu_masks(kind):
    q, k, v = tensors(40, 77)
    outlier_query(q, k, v)
    mask = {"none": None, "additive": randn(1, 2, 40, 77, std=3.0), "boolean": torch.rand(1, 2, 40, 77) > 0.4}[kind]
    if kind == "boolean":
        mask[0, 0, 3] = mask[0, 1, 22] = False
        mask[0, 1, 5] = torch.arange(77) == 76
        assert not cpu(q, k, v, mask=mask)[0, 3, 0].any()
    close(q, k, v, mask=mask)
    close(q, k, v, mask=mask, scale=0.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("which", range(3), ids=["q", "k", "v"])
def test_cpu_what_is_not_finite_is_where_it_is_in_float32(which, value):
    for at in ((0, 9, 1, 3), (0, 9, 1, 39), (0, 0, 0, 0)):
        given = tensors(20, 33)
        given[which][at] = value
        got, wanted = cpu(*given), cpu(*(x.float() for x in given))
        assert torch.equal(got.isnan(), wanted.isnan())
        assert torch.equal(got.isinf(), wanted.isinf())
        torch.testing.assert_close(got.float(), wanted, rtol=0.02, atol=0.02, equal_nan=True)


def test_cpu_both_products_are_in_use():
    """A query that needs float32 changes its neighbours' last bits where they were made of integers, and no others'."""
    q, k, v = tensors(600, 77, H=1, D=40)
    before = cpu(q, k, v)
    q[0, ROWS - 1 :: 2 * ROWS] *= 1e4
    changed = (cpu(q, k, v) != before).any(-1)[0, :, 0].view(-1, 2, ROWS)[..., : ROWS - 1]
    assert not changed[:, 1].any()
    assert changed[:, 0].any() == (native.module("cpu").active_isa() == "avx2")


@pytest.mark.parametrize("L, S, D", [(130, 77, 40), (50, 520, 40), (1100, 40, 40), (67, 33, 160)])
def test_cpu_a_head_has_the_bits_that_it_has_alone(L, S, D):
    """Beside outliers, zeros and NaN in the others, at any number of threads, and with any strides."""
    q, k, v = tensors(L, S, H=3, D=D, N=3)
    q[1, 2] *= 1e4
    k[1, 5, 1] *= 1e5
    k[2, 0, 0, 0] = float("nan")
    q[2, :, 2] = 0.0
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        whole = cpu(q, k, v).view(torch.int16)
        for count in (1, 3):
            torch.set_num_threads(count)
            assert torch.equal(cpu(q, k, v).view(torch.int16), whole)
            for n in range(3):
                alone = cpu(*(x[n : n + 1].clone() for x in (q, k, v)))
                assert torch.equal(alone.view(torch.int16)[0], whole[n])
                for h in range(3):
                    alone = cpu(*(x[n : n + 1, :, h : h + 1] for x in (q, k, v)))
                    assert torch.equal(alone.view(torch.int16)[0, :, 0], whole[n, :, h])
    finally:
        torch.set_num_threads(threads)
