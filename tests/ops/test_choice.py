"""Which backend an op takes: what is slower here is the last choice, and what was measured or estimated so is said."""

from __future__ import annotations

import pytest
import torch

from ldmfast import ops
from ldmfast.ops import registry
from ldmfast.ops.registry import OPS

cv, w1 = ops.conv2d, torch.zeros(64, 32)


def x(*shape):
    return torch.randn(*shape)


@pytest.fixture
def fake_op():
    """Three backends of one tensor, none of which refuses."""
    from ldmfast.ops.registry import Choice

    op = Choice("fake")
    for name in ("cuda", "triton", "torch"):
        op.backend(name)(lambda tensor, name=name: name)
    return op


@pytest.mark.parametrize(
    "refuse, slower, runs",
    [
        ((), (), "cuda"),
        ((), ("cuda",), "triton"),
        (("triton",), ("cuda",), "torch"),
        ((), ("cuda", "triton"), "torch"),
        (("torch",), ("cuda", "triton"), "cuda"),  # no other is left: the best of the slow ones
        (("cuda", "torch"), ("triton",), "triton"),
    ],
)
def test_a_slower_backend_is_the_last_choice(fake_op, refuse, slower, runs):
    for name in refuse:
        fake_op.backends[name].refuses(lambda tensor: "not today")
    for name in slower:
        fake_op.backends[name].slower(lambda tensor: "torch is faster")
    assert fake_op.select([x(1)]).name == runs


def test_a_named_backend_runs_though_it_is_slower(fake_op):
    fake_op.backends["cuda"].slower(lambda tensor: "torch is faster")
    assert fake_op.select([x(1)], "cuda").name == "cuda"
    with ops.use_backend("cuda"):
        assert fake_op.select([x(1)]).name == "cuda"


def on_a_gpu(op, monkeypatch, arch):
    """Tensors of the CPU are taken for a GPU's, of this architecture."""
    monkeypatch.delitem(op.backends, "cpu")
    for name in {"cuda", "triton", "sdpa"} & op.backends.keys():
        monkeypatch.setattr(op.backends[name], "devices", None)
        if name != "sdpa":
            monkeypatch.setattr(op.backends[name], "conditions", [])
    monkeypatch.setattr(op, "_automatic", {})
    monkeypatch.setattr("ldmfast.ops.speeds.architecture", lambda device: arch)


@pytest.mark.parametrize(
    "arch, D, S, dtype, runs",
    [
        (90, 40, 4096, torch.float16, "cuda"),
        (90, 64, 4096, torch.float16, "sdpa"),
        (90, 128, 1024, torch.bfloat16, "sdpa"),
        (90, 64, 77, torch.float16, "cuda"),  # a prompt's keys
        (90, 64, 4096, torch.float32, "cuda"),
        (80, 64, 4096, torch.float16, "cuda"),
        (80, 256, 16, torch.float16, "cuda"),
        (80, 512, 16, torch.bfloat16, "sdpa"),  # Triton refuses it
        (80, 512, 16, torch.float32, "cuda"),
        (None, 64, 4096, torch.float16, "cuda"),
    ],
)
def test_attention_leaves_to_sdpa_what_it_does_faster(arch, D, S, dtype, runs, monkeypatch):
    op = OPS["attention"]
    on_a_gpu(op, monkeypatch, arch)
    monkeypatch.setattr(
        op.backends["triton"], "conditions", [lambda q, *others: "over 256" if q.shape[3] > 256 else None]
    )
    q, k = torch.empty(1, 1, 1, D, dtype=dtype), torch.empty(1, S, 1, D, dtype=dtype)
    assert op.select((q, k, k, 1.0, None)).name == runs
    said = ops.explain(ops.attention, q, k, k)
    assert ("slower here: sdpa is faster (an estimate, not measured: H100" in said) == (runs == "sdpa")
    assert f"{runs:<10} runs" in said
    asked = ops.explain(ops.attention, q, k, k, backend="cuda")
    assert ("cuda       runs (asked for), slower here" in asked) == (runs == "sdpa")


@pytest.mark.parametrize("mask", [None, torch.rand(2, 6) > 0.5], ids=["all keys", "some keys"])
def test_pytorchs_attention_is_a_backend_with_its_own_gradient(mask, monkeypatch):
    monkeypatch.setattr(OPS["attention"].backends["sdpa"], "devices", None)
    q, k, v = (x(2, size, 3, 8).requires_grad_() for size in (5, 6, 6))
    found, wanted = (ops.attention(q, k, v, mask=mask, backend=name) for name in ("sdpa", "torch"))
    assert torch.equal(found, wanted)
    for got, exact in zip(*(torch.autograd.grad(y.square().sum(), (q, k, v)) for y in (found, wanted)), strict=True):
        assert torch.equal(got, exact)


@pytest.mark.parametrize(
    "D, S, dtype, mask, sentence",
    [
        (40, 4, torch.float64, None, "no fused kernel of PyTorch's has float64"),
        (40, 0, torch.float16, None, "there is nothing to attend to"),
        (40, 4, torch.float32, None, "cuDNN's attention has no float32"),
        (40, 4, torch.float16, torch.ones(1, 4, dtype=torch.bool), "it is called without a mask only"),
        (160, 4, torch.float16, None, "head width D=160; cuDNN's attention takes multiples of 8 up to 128"),
        (44, 4, torch.float16, None, "head width D=44; cuDNN's attention takes multiples of 8 up to 128"),
        (64, 4, torch.float16, None, "cuDNN's attention needs sm_80, this GPU is sm_75"),
    ],
)
def test_cudnns_attention_says_what_it_does_not_take(D, S, dtype, mask, sentence, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    q, k = torch.zeros(1, 4, 1, D, dtype=dtype), torch.zeros(1, S, 1, D, dtype=dtype)
    assert OPS["attention"].backends["cudnn"].reason((q, k, k, 1.0, mask)) == sentence


@pytest.mark.parametrize(
    "shape, named, dtype, lanes, runs",
    [
        ((64, 64, 3), {"padding": 1}, torch.float32, 16, "cpu"),
        ((64, 64, 3), {"padding": 1}, torch.bfloat16, 16, "cpu"),
        ((64, 64, 1), {}, torch.float32, 16, "torch"),
        ((64, 64, 1), {}, torch.float32, 8, "cpu"),
        ((640, 64, 1), {}, torch.float32, 8, "cpu"),
        ((4, 64, 3), {"padding": 1}, torch.float32, 8, "cpu"),
        ((4, 4, 1), {}, torch.float32, 8, "cpu"),  # narrow
        ((64, 64, 1), {}, torch.bfloat16, 16, "torch"),
        ((64, 64, 1), {}, torch.bfloat16, 8, "cpu"),  # both widen it
        ((64, 64, 1), {}, torch.float16, 16, "cpu"),
        ((64, 64, 1), {"stride": 2}, torch.float32, 16, "cpu"),  # 16x16: laying the weight out costs oneDNN more
        ((64, 64, 1), {"upsample": 2}, torch.float32, 16, "cpu"),  # the enlarged picture is not written
        ((4, 64, 3), {"padding": 1}, torch.float32, 16, "torch"),
        ((64, 4, 3), {"padding": 1}, torch.bfloat16, 16, "cpu"),  # scalar products along the channels
        ((64, 12, 3), {"padding": 1}, torch.bfloat16, 16, "torch"),
        ((64, 4, 1), {"stride": 2}, torch.float32, 16, "torch"),
        ((64, 64, 3), {"padding": 1}, torch.bfloat16, 4, "torch"),
        ((64, 64, 3), {"padding": 1}, torch.float32, 4, "cpu"),
    ],
)
def test_a_convolution_is_left_to_onednn_where_it_is_faster(shape, named, dtype, lanes, runs, monkeypatch):
    monkeypatch.setattr("ldmfast.ops.native.lanes", lambda: lanes)
    monkeypatch.setattr("ldmfast.ops.native.pairs", lambda: int(lanes == 16))
    monkeypatch.setattr("ldmfast.ops.native.tiles", lambda dtype: 0)
    Ci, Co, k = shape
    args = OPS["conv2d"].normalise(x(1, Ci, 32, 32).to(dtype), x(Co, Ci, k, k).to(dtype), **named)
    assert OPS["conv2d"].select(args).name == runs
    said = ops.explain(cv, *args[:2], **named)
    assert ("slower here: torch is faster (measured: Zen 4" in said) == (runs == "torch")


@pytest.mark.parametrize(("pairs", "runs"), [(1, "torch"), (0, "cpu")])
def test_bfloat16_is_left_to_onednn_where_pairs_are_fast(pairs, runs, monkeypatch):
    monkeypatch.setattr("ldmfast.ops.native.lanes", lambda: 16)
    monkeypatch.setattr("ldmfast.ops.native.pairs", lambda: pairs)
    monkeypatch.setattr("ldmfast.ops.native.tiles", lambda dtype: 0)
    args = OPS["conv2d"].normalise(x(1, 64, 32, 32).bfloat16(), x(64, 64, 1, 1).bfloat16())
    assert OPS["conv2d"].select(args).name == runs


@pytest.mark.parametrize(("tiles", "sixteen"), [(1, "torch"), (2, "cpu")])
def test_sixteen_bits_are_left_to_onednn_where_it_alone_multiplies_by_tiles(tiles, sixteen, monkeypatch):
    monkeypatch.setattr("ldmfast.ops.native.lanes", lambda: 16)
    monkeypatch.setattr("ldmfast.ops.native.tiles", lambda dtype: tiles * (dtype is torch.bfloat16))
    for dtype, runs in ((torch.bfloat16, sixteen), (torch.float32, "cpu")):
        args = OPS["conv2d"].normalise(x(1, 64, 32, 32).to(dtype), x(64, 64, 3, 3).to(dtype), padding=1)
        assert OPS["conv2d"].select(args).name == runs
        args = OPS["linear"].normalise(x(77, 32).to(dtype), w1.to(dtype))
        assert OPS["linear"].select(args).name == runs


def test_a_row_of_a_linear_layer_is_left_to_blas(monkeypatch):
    monkeypatch.setattr("ldmfast.ops.native.lanes", lambda: 16)
    for rows, dtype, runs in ((1, torch.float32, "torch"), (77, torch.float32, "cpu"), (1, torch.float16, "cpu")):
        args = OPS["linear"].normalise(x(rows, 32).to(dtype), w1.to(dtype))
        assert OPS["linear"].select(args).name == runs


def test_group_norms_gradient_is_tritons_where_triton_runs(monkeypatch):
    op = registry.BACKWARD_OPS["group_norm_silu_backward"]
    on_a_gpu(op, monkeypatch, 90)
    args = (x(1, 8, 2, 2), x(1, 8, 2, 2), None, None, 2, 1e-5, True, None, None, None)
    assert op.select(args).name == "triton"
    monkeypatch.setattr(op.backends["triton"], "conditions", [lambda *args: "triton is not installed"])
    assert op.select(args).name == "cuda"  # not the reference: it was compared with Triton
