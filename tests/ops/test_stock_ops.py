"""PyTorch's own operations under `exact`: a sample's bits do not depend on its batch or the threads, and are right."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import ldmfast
from ldmfast import ops
from ldmfast.ops.contract.switch import modes

N = 6
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 3e-3}
dtypes = pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=lambda dtype: str(dtype).removeprefix("torch."))


@pytest.fixture(autouse=True)
def threads_restored():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@contextlib.contextmanager
def exact(threads):
    torch.set_num_threads(threads)
    with ldmfast.numerics("exact"), ldmfast.fixed_order():
        yield
    assert torch.get_num_threads() == threads and not modes.count


def hold(function, *tensors):
    """function(*samples) under `exact`: near to stock, the same for a part as for all."""
    stock = function(*tensors)
    with exact(1):
        whole = function(*tensors)
    assert whole.shape == stock.shape and whole.dtype == stock.dtype and whole.stride() == stock.stride()
    assert (whole - stock).abs().max() <= TOLERANCE[stock.dtype] * (1 + stock.abs().max())
    for threads in (1, 3):
        for part in (slice(0, N), slice(0, 1), slice(1, 2), slice(5, 6), slice(2, 5)):
            with exact(threads):
                # a view on the batch, which starts where the sample lies, and a tensor of its own
                assert torch.equal(function(*(t[part] for t in tensors)), whole[part]), (threads, part)
                assert torch.equal(function(*(t[part].clone() for t in tensors)), whole[part]), (threads, part)


def randn(*shape, dtype):
    return torch.randn(shape).to(dtype)


@dtypes
@pytest.mark.parametrize("rows", [1, 2, 19])
def test_products(rows, dtype):
    x, w, b = randn(N, rows, 70, dtype=dtype), randn(33, 70, dtype=dtype) / 8, randn(33, dtype=dtype)
    keys = randn(N, 11, 70, dtype=dtype) / 8
    hold(lambda x: F.linear(x, w), x)
    hold(lambda x: F.linear(x, w, b), x)
    hold(lambda x: x @ w.T, x[:, 0].contiguous())
    hold(lambda x: x @ w[0], x[:, 0].contiguous())
    hold(lambda x, y: x @ y.mT, x, keys)
    hold(lambda x, y: torch.einsum("nrk,nsk->nsr", x, y), x, keys)
    # the legacy attention processor's scores
    hold(lambda x, y: torch.baddbmm(x.new_full((len(x), rows, 11), float("nan")), x, y.mT, beta=0, alpha=0.3), x, keys)
    hold(lambda x: torch.addmm(b, x, w.T, beta=0.5, alpha=2), x[:, 0].contiguous())


FUNCTIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu of tanh": lambda x: F.gelu(x, approximate="tanh"),
    "sigmoid": torch.sigmoid,
    "mish": F.mish,
    "softplus": F.softplus,
    "power": lambda x: x.abs() ** 1.5,
    "rsqrt": lambda x: (x.abs() + 0.1).rsqrt(),
    "in place": lambda x: F.silu(x.clone(), inplace=True),
    "scaled sum": lambda x: torch.add(x, x.mT.reshape(x.shape), alpha=2.7),
    "scaled sum in place": lambda x: x.clone().add_(x.mT.reshape(x.shape), alpha=2.7),
    "broadcast": lambda x: torch.lerp(x[:, :1], x, 0.3),
}


@dtypes
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("layout", ["rows", "channels_last"])
def test_functions_of_an_element(name, layout, dtype):
    shape, memory_format = ((7, 13), None) if layout == "rows" else ((7, 5, 9), torch.channels_last)
    x = randn(N, *shape, dtype=dtype)
    x = x if memory_format is None else x.contiguous(memory_format=memory_format)
    hold(FUNCTIONS[name], x)


def test_threads_that_part_a_large_tensor():
    hold(F.silu, torch.randn(N, 30011))
    with exact(1):
        wanted = torch.randn(70001).sum(), torch.linspace(0, 1, 70001).std()
    torch.manual_seed(0)
    torch.randn(N, 30011)
    with exact(3):
        assert torch.equal(torch.randn(70001).sum(), wanted[0])
        assert torch.equal(torch.linspace(0, 1, 70001).std(), wanted[1])


@dtypes
def test_what_sums_within_a_sample(dtype):
    x, picture = randn(N, 5, 37, dtype=dtype), randn(N, 8, 9, 7, dtype=dtype)
    q, mask = randn(N, 2, 9, 16, dtype=dtype), randn(N, 1, 9, 9, dtype=dtype)
    wide, turned = nn.Conv2d(8, 6, 5, padding=2).to(dtype), nn.ConvTranspose2d(8, 6, 3, 2).to(dtype)
    grouped = nn.Conv2d(8, 8, 3, groups=4).to(dtype)
    with torch.no_grad():
        hold(lambda x: F.softmax(x, -1), x)
        hold(lambda x: F.layer_norm(x, x.shape[-1:]), x)
        hold(lambda x: F.rms_norm(x, x.shape[-1:], eps=1e-6), x)
        hold(lambda x: F.group_norm(x, 4), picture)
        hold(lambda q: F.scaled_dot_product_attention(q, q, q), q)
        hold(lambda q: F.scaled_dot_product_attention(q, q, q, is_causal=True), q)
        hold(lambda q, m: F.scaled_dot_product_attention(q, q, q, attn_mask=m), q, mask)
        for convolution in (wide, turned, grouped):
            hold(convolution, picture)
            hold(convolution, picture.contiguous(memory_format=torch.channels_last))
        hold(lambda x: F.interpolate(x, scale_factor=0.5, mode="bilinear"), picture)
        hold(lambda x: F.interpolate(x, size=(4, 5), mode="bicubic", antialias=True), picture.float())
        hold(lambda x: x.float().std(dim=(1, 2, 3), keepdim=True), picture)
        hold(lambda x: x.float().mean((1, 2)), x)
        hold(lambda x: x.float().norm(dim=1), x)


def test_distances_to_a_codebook():
    codes = torch.randn(20, 3)
    hold(lambda x: torch.cdist(x.flatten(0, 1), codes).unflatten(0, x.shape[:2]), torch.randn(N, 16, 3))


def test_a_gradient_passes():
    x, w = torch.randn(3, 5, requires_grad=True), torch.randn(4, 5)
    (wanted,) = torch.autograd.grad(F.silu(F.linear(x, w)).sum(), x)
    with exact(1):
        (got,) = torch.autograd.grad(F.silu(F.linear(x, w)).sum(), x)
    torch.testing.assert_close(got, wanted)


def test_a_mode_of_somebody_else_still_sees_our_ops():
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    x, w = torch.randn(2, 5), torch.randn(4, 5)
    with Watch(), exact(1):
        ops.linear(x, w)
    assert any("ldmfast.linear" in name for name in seen)


def test_fast_has_no_mode():
    with ldmfast.fixed_order():
        assert not torch._C._len_torch_dispatch_stack()
    with ldmfast.numerics("exact"), ldmfast.fixed_order(), ldmfast.fixed_order():
        assert torch._C._len_torch_dispatch_stack() == 1
