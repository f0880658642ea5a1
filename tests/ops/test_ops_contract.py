"""What every op promises beside its numbers: errors, gradients, fakes, autocast."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch
from cases import SMALL, TINY
from torch.library import opcheck

from ldmfast import ops
from ldmfast.ops import registry
from ldmfast.ops.registry import OPS


def small(name, dtype=torch.float32):
    """The public function, and (args, kwargs) of a small case with most optional arguments."""
    args, kwargs = SMALL[name].make(dtype)
    return getattr(ops, name), args, kwargs


def x(*shape, **kwargs):
    return torch.randn(*shape, **kwargs)


gn, at, tm, dd = ops.group_norm_silu, ops.attention, ops.timestep_mlp, ops.ddim_step
li, cv, ln, ga = ops.linear, ops.conv2d, ops.layer_norm, ops.group_norm_affine
qkv, gg, br, rl = ops.qkv_projection, ops.geglu, ops.bias_residual, ops.residual_layer_norm
w1, w2 = torch.zeros(64, 32), torch.zeros(16, 64)

WRONG = [
    # op, call, error, words that the message must hold
    (lambda: gn(x(2, 320, 4, 4), None, None, 48), ValueError, "group_norm_silu: C=320 is not divisible by groups=48"),
    (lambda: gn(x(2, 320, 4, 4), None, None, 0), ValueError, "group_norm_silu: C=320.*groups=0"),
    (lambda: gn(x(8), None, None, 1), ValueError, r"group_norm_silu: x has shape \[8\], expected \[N, C, ...\]"),
    (lambda: gn([1.0], None, None, 1), TypeError, "group_norm_silu: x is list, expected a tensor"),
    (lambda: gn(x(2, 8, 4, 4), x(4), None, 2), ValueError, r"weight has shape \[4\], expected \[C\] = \[8\]"),
    (lambda: gn(x(2, 8, 4, 4), None, x(8).half(), 2), ValueError, "bias is float16, expected float32"),
    (lambda: gn(x(2, 8, 4, 4), None, None, 2, add=x(8)), ValueError, r"add has shape \[8\], expected \[N, C\]"),
    (lambda: gn(x(2, 8, 4, 4).int(), None, None, 2), ValueError, "x is int32, expected float32"),
    (lambda: gn(x(2, 8, 4, 4), x(8, device="meta"), None, 2), ValueError, "weight is on meta, expected cpu as x"),
    (lambda: gn(x(2, 8, 4, 4), None, None, 2, eps=-1.0), ValueError, "eps is -1.0"),
    (lambda: at(x(2, 8, 40), x(2, 8, 1, 40), x(2, 8, 1, 40)), ValueError, r"attention: q has shape.*\[N, L, H, D\]"),
    (lambda: at(x(2, 8, 4, 40), x(2, 9, 2, 40), x(2, 9, 2, 40)), ValueError, r"attention: k has.*\[2, S, 4, 40\] as q"),
    (lambda: at(x(2, 8, 4, 40), x(2, 9, 4, 40), x(2, 8, 4, 40)), ValueError, "attention: v has shape.* as k"),
    (lambda: at(x(2, 8, 4, 40), x(2, 9, 4, 40).half(), x(2, 9, 4, 40)), ValueError, "k is float16, expected float32"),
    (lambda: at(x(2, 8, 40, 4).mT, x(2, 9, 4, 40), x(2, 9, 4, 40)), ValueError, "q has stride 4 in D, expected 1"),
    (lambda: at(*[x(2, 8, 4, 40)] * 3, mask=x(2, 9) > 0), ValueError, r"mask has shape.*\[N, H, L, S\]"),
    (lambda: at(*[x(2, 8, 4, 40)] * 3, mask=x(8, 8).long()), ValueError, "mask is int64, expected bool, float32"),
    (lambda: at(x(2, 8, 4, 40), *[x(2, 9, 4, 40, device="meta")] * 2), ValueError, "k is on meta, expected cpu as q"),
    (lambda: tm(x(2, 2), w1, None, w2, None, dim=32), ValueError, r"timestep_mlp: t has.*expected \[N\]"),
    (lambda: tm(x(2), w1, None, w2, None, dim=30), ValueError, r"w1 has shape \[64, 32\], expected \[F, dim\]"),
    (lambda: tm(x(2), w1, None, w2.mT, None, dim=32), ValueError, r"w2 has shape \[64, 16\], expected \[E, F\]"),
    (lambda: tm(x(2), w1, None, w2.half(), None, dim=32), ValueError, "w2 is float16, expected float32"),
    (lambda: tm(x(2), w1, x(3), w2, None, dim=32), ValueError, r"b1 has shape \[3\], expected \[F\] = \[64\]"),
    (lambda: tm(x(2), w1, None, w2, None, dim=1), ValueError, "dim=1"),
    (lambda: tm(3, w1, None, w2, None, dim=32), TypeError, "timestep_mlp: t is int, expected a tensor"),
    (lambda: tm(x(2, device="meta"), w1, None, w2, None, dim=32), ValueError, "t is on meta, expected cpu as w1"),
    (lambda: dd(x(2, 4), x(2, 4), 0.5, 0.6, guidance=7.5), ValueError, r"model_output has.*\[2N, ...\] = \[4, 4\]"),
    (lambda: dd(x(2, 4), x(2, 5), 0.5, 0.6), ValueError, r"ddim_step: model_output has shape \[2, 5\]"),
    (lambda: dd(x(2, 4), x(2, 4), 1.5, 0.6), ValueError, "alpha_t is 1.5"),
    (lambda: dd(x(2, 4), x(2, 4), x(3).abs(), 0.6), ValueError, r"alpha_t has shape \[3\], expected a scalar or \[N\]"),
    (lambda: dd(x(2, 4), x(2, 4), 0.0, 0.6), ValueError, "alpha_t is 0, where epsilon does not determine x0"),
    (lambda: dd(x(2, 4), x(2, 4), 0.5, 0.6, sigma=0.1), ValueError, "noise is None"),
    (lambda: dd(x(2, 4), x(2, 4), 0.5, 0.6, sigma=0.9, noise=x(2, 4)), ValueError, "sigma is 0.9, expected at most"),
    (lambda: dd(x(2, 4), x(2, 4), 0.5, 0.6, prediction="eps"), ValueError, "prediction is 'eps', expected epsilon"),
    (lambda: dd(x(2, 4), x(2, 4), 0.5, 0.6, guidance=float("nan"), clip=1), ValueError, "guidance is nan"),
    (lambda: dd(x(2, 4), x(2, 4), 0.5, 0.6, clip=-1.0), ValueError, "clip is -1.0"),
    (lambda: dd(x(2, 4).long(), x(2, 4), 0.5, 0.6), ValueError, "sample is int64, expected float32"),
    (lambda: dd(x(2, 4), x(2, 4, device="meta"), 0.5, 0.6), ValueError, "model_output is on meta, expected cpu"),
    (lambda: qkv(x(2, 8), x(4, 8), 3), TypeError, "qkv_projection: second is int, expected a tensor"),
    (lambda: qkv(x(2, 8), x(4, 7), x(4, 7)), ValueError, r"first has shape \[4, 7\], expected \[N, K\] = \[N, 8\]"),
    (lambda: qkv(x(2, 8), x(4, 8), x(5, 8)), ValueError, r"second has shape \[5, 8\], expected first's shape"),
    (lambda: qkv(x(2, 8), x(4, 8), x(4, 8), x(4, 8).half()), ValueError, "third is float16, expected float32"),
    (lambda: qkv(x(2, 8), x(4, 8), x(4, 8), layer_norm=(x(8), None)), TypeError, "expected .weight, bias, eps. or"),
    (lambda: qkv(x(2, 8), x(4, 8), x(4, 8), layer_norm=(None, None, -1.0)), ValueError, "eps is -1.0"),
    (lambda: gg(3), TypeError, "geglu: x is int, expected a tensor"),
    (lambda: gg(x(2, 7)), ValueError, r"geglu: x has shape \[2, 7\], expected \[..., 2F\]"),
    (lambda: gg(x(2, 8).int()), ValueError, "geglu: x is int32, expected float32"),
    (lambda: br(x(8)), ValueError, r"bias_residual: x has shape \[8\], expected \[N, C, ...\]"),
    (lambda: br(x(2, 8, 3), x(7)), ValueError, r"bias_residual: bias has shape \[7\], expected \[C\] = \[8\]"),
    (lambda: br(x(2, 8, 3), add=x(8)), ValueError, r"add has shape \[8\], expected \[N, C\] = \[2, 8\]"),
    (lambda: br(x(2, 8, 3), residual=x(2, 8, 4)), ValueError, r"residual has shape \[2, 8, 4\], expected x's shape"),
    (lambda: br(x(2, 8, 3), x(8).half()), ValueError, "bias is float16, expected float32"),
    (lambda: rl(x(2, 8), x(3, 8), None, None), ValueError, r"residual has shape \[3, 8\], expected x's shape"),
    (lambda: rl(x(2, 8), x(2, 8), x(7), None), ValueError, r"residual_layer_norm: weight has shape \[7\]"),
    (lambda: rl(x(2, 8), x(2, 8), None, None, 0.0), ValueError, "residual_layer_norm: eps is 0.0, expected more"),
    (lambda: rl(x(2, 8), x(2, 8).half(), None, None), ValueError, "residual is float16, expected float32"),
    (lambda: ln(3, None, None), TypeError, "layer_norm: x is int, expected a tensor"),
    (lambda: ln(x(2, 8), x(7), None), ValueError, r"layer_norm: weight has shape \[7\], expected \[K\] = \[8\]"),
    (lambda: ln(x(2, 8), x(8).half(), None), ValueError, "layer_norm: weight is float16, expected float32"),
    (lambda: ln(x(2, 8), None, None, -1.0), ValueError, "layer_norm: eps is -1.0, expected more than 0"),
    (lambda: ga(x(2, 8), None, None, 2), ValueError, r"x has shape \[2, 8\], expected \[N, C1, H, W\]"),
    (lambda: ga(x(2, 8, 3, 3), None, None, 3), ValueError, "group_norm_affine: C=8 is not divisible by groups=3"),
    (lambda: ga(x(2, 8, 3, 3), x(8), None, 2, x2=x(2, 4, 3, 3)), ValueError, r"weight has.*\[C\] = \[12\]"),
    (lambda: ga(x(2, 8, 3, 3), None, None, 2, x2=x(2, 4, 3, 2)), ValueError, r"x2 has shape.*\[2, C2, 3, 3\]"),
    (lambda: ga(x(2, 8, 3, 3), None, None, 2, scale=x(8)), ValueError, r"scale has shape \[8\], expected \[N, C\]"),
    (lambda: ga(x(2, 8, 3, 3), None, None, 2, 0.0), ValueError, "eps is 0.0, expected more than 0"),
    (lambda: li([1.0], w1), TypeError, "linear: x is list, expected a tensor"),
    (lambda: li(x(2, 30), w1), ValueError, r"linear: weight has shape \[64, 32\], expected \[N, K\] = \[N, 30\]"),
    (lambda: li(x(2, 32).int(), w1), ValueError, "linear: x is int32, expected float32"),
    (lambda: li(x(2, 32), w1.half()), ValueError, "linear: weight is float16, expected float32"),
    (lambda: li(x(2, 32), w1, x(32), activation="geglu"), ValueError, r"bias has shape \[32\], expected .* = \[64\]"),
    (lambda: li(x(2, 32), w1, activation="relu"), ValueError, "activation is 'relu', expected none, silu, gelu, geglu"),
    (lambda: li(x(2, 32), w1[:5], activation="geglu"), ValueError, "weight has 5 rows, expected an even number"),
    (lambda: li(x(2, 32), w1, residual=x(2, 32)), ValueError, r"residual has shape.*\[..., N\] = \[2, 64\]"),
    (lambda: li(x(2, 32), w1, layer_norm=1e-5), TypeError, r"layer_norm is 1e-05, expected \(weight, bias, eps\)"),
    (lambda: li(x(2, 32), w1, layer_norm=(x(3), None, 1e-5)), ValueError, r"norm_weight has shape \[3\]"),
    (lambda: li(x(2, 32), w1, layer_norm=(None, None, 0.0)), ValueError, "layer_norm's eps is 0.0"),
    (lambda: li(x(2, 32), w1, layer_norm=(None, x(32), None)), ValueError, "eps is None beside norm_weight"),
    (lambda: li(x(2, 32), x(4, 32, device="meta")), ValueError, "weight is on meta, expected cpu as x"),
    (lambda: li(x(2, 32).double(), w1.double(), backend="cpu"), NotImplementedError, "float64 is not compiled"),
    (lambda: li(x(2, 0), x(3, 0), backend="cpu"), NotImplementedError, "K is 0"),
    (lambda: cv(x(4, 8, 8), x(4, 4, 3, 3)), ValueError, r"conv2d: x has shape.*expected \[N, C1, H, W\]"),
    (lambda: cv(x(1, 4, 8, 8), x(4, 5, 3, 3)), ValueError, r"weight has shape.*\[Co, Ci, k, k\] = \[Co, 4, k, k\]"),
    (lambda: cv(x(1, 4, 8, 8), x(4, 4, 3, 1)), ValueError, r"weight has shape \[4, 4, 3, 1\], expected"),
    (lambda: cv(x(1, 4, 8, 8), x(4, 4, 3, 3).half()), ValueError, "weight is float16, expected float32"),
    (lambda: cv(x(1, 4, 2, 2), x(4, 4, 3, 3)), ValueError, r"x has shape \[1, 4, 2, 2\], too small for weight"),
    (lambda: cv(x(1, 4, 8, 8), x(4, 4, 3, 3), stride=0), ValueError, "stride is 0, expected at least 1"),
    (lambda: cv(x(1, 4, 8, 8), x(4, 4, 3, 3), padding=-1), ValueError, "padding is -1, expected at least 0"),
    (lambda: cv(x(1, 4, 8, 8), x(4, 4, 3, 3), upsample=3), ValueError, "upsample is 3, expected 1 or 2"),
    (lambda: cv(x(1, 4, 8, 8), x(4, 6, 3, 3), x2=x(1, 2, 8, 4)), ValueError, r"x2 has shape.*\[1, C2, 8, 8\]"),
    (lambda: cv(x(1, 4, 8, 8), x(5, 4, 1, 1), add=x(5)), ValueError, r"add has shape \[5\], expected \[N, Co\]"),
    (lambda: cv(x(1, 4, 8, 8), x(5, 4, 3, 3), residual=x(1, 5, 8, 8)), ValueError, r"residual has.*\[1, 5, 6, 6\]"),
    (lambda: cv(x(1, 4, 8, 8), x(5, 4, 1, 1), norm_scale=x(1, 4)), ValueError, "one of norm_scale and norm_shift is"),
    (lambda: cv(x(1, 4, 8, 8), x(5, 4, 1, 1), norm_silu=True), ValueError, "norm_silu is True beside norm_scale None"),
    (lambda: cv(x(1, 4, 8, 8), x(5, 4, 5, 5), backend="cpu"), NotImplementedError, "weight is 5x5; the kernel takes"),
    (lambda: cv(x(1, 4, 8, 8), x(5, 4, 1, 1), backend="cuda"), NotImplementedError, "it has no such kernel"),
]


@pytest.mark.parametrize("call, error, words", WRONG, ids=range(len(WRONG)))
def test_wrong_argument_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize("name", OPS)
def test_unknown_backend(name):
    function, args, kwargs = small(name)
    with pytest.raises(
        ValueError, match=f"{name}: unknown backend 'tpu'; known: cuda, triton, cpu, sdpa, cudnn, torch"
    ):
        function(*args, **kwargs, backend="tpu")


@pytest.mark.parametrize("name", OPS)
def test_a_named_backend_never_falls_back(name):
    function, args, kwargs = small(name)
    reason = "runs on cuda tensors, not cpu" if "cuda" in OPS[name].backends else "it has no such kernel"
    with pytest.raises(NotImplementedError, match=f"{name}: backend cuda refuses: {reason}"):
        function(*args, **kwargs, backend="cuda")
    with ops.use_backend("cuda"), pytest.raises(NotImplementedError, match="backend cuda refuses"):
        function(*args, **kwargs)


def test_a_backend_that_was_not_built_says_so(monkeypatch):
    reason = "was not built (install ldmfast with a C++17 compiler on PATH)"
    monkeypatch.setattr("ldmfast.ops.native.missing", lambda name: reason)
    function, args, kwargs = small("attention")
    with pytest.raises(NotImplementedError, match=re.escape(f"attention: backend cpu refuses: {reason}")):
        function(*args, **kwargs, backend="cpu")
    assert f"cpu        refuses: {reason}" in ops.explain(function, *args, **kwargs)
    assert function(*args, **kwargs).isfinite().all()  # the reference runs when nobody was named


def test_every_refusal_is_listed_when_none_runs(monkeypatch):
    op = OPS["attention"]
    for backend in op.backends.values():
        for method in ("refusal", "reason"):
            monkeypatch.setattr(backend, method, lambda args, name=backend.name: f"{name} is out")
    _, args, kwargs = small("attention")
    with pytest.raises(NotImplementedError, match="every backend refuses. cuda: cuda is out; .*torch: torch is out"):
        ops.attention(*args, **kwargs)


def test_use_backend_nests_and_stays():
    assert registry.chosen_backend() is None
    with ops.use_backend("torch"):
        with ops.use_backend("cpu"):
            assert registry.chosen_backend() == "cpu"
        assert registry.chosen_backend() == "torch"
    assert registry.chosen_backend() is None
    with pytest.raises(ValueError, match="use_backend: unknown backend 'tpu'"):
        ops.use_backend("tpu")
    statement = ops.use_backend("torch")
    assert registry.chosen_backend() == "torch"
    statement.__exit__()


@pytest.mark.parametrize(
    "name, words",
    [("torch", "torch      runs (asked for)"), ("fast", "ValueError: LDMFAST_BACKEND: unknown backend 'fast'")],
)
def test_environment_chooses(name, words):
    code = "import torch; from ldmfast import ops; print(ops.explain('attention', *[torch.ones(1, 2, 1, 8)] * 3))"
    env = {**os.environ, "LDMFAST_BACKEND": name}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert words in done.stdout + done.stderr


def test_explain_reports_bad_arguments():
    assert "not divisible by groups=3" in ops.explain(ops.group_norm_silu, x(2, 8, 4, 4), None, None, 3)


@pytest.mark.parametrize("name", OPS)
def test_opcheck(name):
    """PyTorch's own checks: schema, fake implementation, autograd registration, tracing with dynamic shapes."""
    _, args, kwargs = small(name)
    arguments = list(OPS[name].normalise(*args, **kwargs))
    for i, value in enumerate(arguments):
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            arguments[i] = value.requires_grad_()
    opcheck(getattr(torch.ops.ldmfast, name).default, (*arguments, None))


@pytest.mark.parametrize("backend", registry.RANKS)
@pytest.mark.parametrize("name", OPS)
def test_gradients_equal_the_reference(name, backend):
    function, args, kwargs = small(name)
    arguments = OPS[name].normalise(*args, **kwargs)
    if backend not in OPS[name].backends:
        pytest.skip(f"{backend}: it has no such kernel")
    if reason := OPS[name].backends[backend].refusal(arguments):
        pytest.skip(f"{backend}: {reason}")

    def gradients(call, arguments):
        inputs = [
            value.detach().requires_grad_() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
            for value in arguments
        ]
        outputs = call(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.manual_seed(1)
        sum((out * torch.randn_like(out)).sum() for out in outputs).backward()
        return [value.grad for value in inputs if isinstance(value, torch.Tensor) and value.is_floating_point()]

    ours = gradients(lambda *inputs: OPS[name](*inputs, backend), arguments)
    wanted = gradients(OPS[name].reference, arguments)
    assert len(ours) == len(wanted) > 0
    for mine, theirs in zip(ours, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", OPS)
def test_gradcheck(name):
    args, kwargs = TINY[name]()
    arguments = [
        value.requires_grad_() if isinstance(value, torch.Tensor) else value
        for value in OPS[name].normalise(*args, **kwargs)
    ]
    assert torch.autograd.gradcheck(lambda *inputs: OPS[name](*inputs, None), arguments)


def test_no_silent_detach_in_no_grad_branches():
    """A batch of none and no keys keep their way back."""
    q = x(1, 3, 2, 8, requires_grad=True)
    ops.attention(q, q[:, :0], q[:, :0]).sum().backward()
    assert q.grad is not None and not q.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    q = x(1, 5, 2, 8, requires_grad=True)
    w = torch.nn.Parameter(x(8))
    with torch.autocast("cpu", dtype):
        out = ops.attention(q, q, q)
        assert out.dtype is dtype
        assert ops.timestep_mlp(torch.arange(2), w1, None, w2, None, dim=32).dtype is dtype
        assert gn(x(1, 8, 2, 2).to(dtype), w, w, 2).dtype is dtype  # 16-bit x beside float32 parameters
        assert gn(x(1, 8, 2, 2), w, w, 2).dtype is torch.float32
        assert dd(x(1, 4), x(1, 4), 0.5, 0.6)[0].dtype is torch.float32
        assert li(x(2, 32), w1, layer_norm=(x(32), None, 1e-5)).dtype is dtype
        norm = {"norm_scale": x(1, 4), "norm_shift": x(1, 4)}
        assert cv(x(1, 4, 5, 5), x(3, 4, 3, 3), x(3), **norm).dtype is dtype
    out.sum().backward()
    assert q.grad.dtype is torch.float32 and q.grad.isfinite().all()


def test_seen_through_by_compile():
    """One graph, no break, and the same numbers; aot_eager needs no compiler."""

    def step(q, weight):
        h = ops.group_norm_silu(q.flatten(2).mT, weight, weight, 4)
        return ops.attention(q, q, q).sum() + h.sum()

    q, weight = x(2, 6, 2, 8), x(16)
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, weight), step(q, weight))


def test_table_of_alphas_equals_scalars():
    sample, output = x(3, 4, 5, 5), x(6, 4, 5, 5)
    alphas, previous = torch.tensor([0.2, 0.4, 0.9]), torch.tensor([0.3, 0.6, 1.0])
    together = dd(sample, output, alphas, previous, guidance=4.0)
    for i in range(3):
        alone = dd(sample[i : i + 1], output[i::3], alphas[i].item(), previous[i].item(), guidance=4.0)
        for mine, theirs in zip(together, alone, strict=True):
            torch.testing.assert_close(mine[i : i + 1], theirs, rtol=1e-6, atol=1e-6)


def test_import_touches_no_cuda():
    code = "import torch, ldmfast; ldmfast.ops; assert not torch.cuda.is_initialized()"
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)


@pytest.mark.parametrize("name", OPS)
def test_the_example_is_one_of_the_ops_inputs(name):
    op = OPS[name]
    for dtype in (torch.float32, torch.bfloat16):
        args = op.example(dtype, "cpu")
        op.check(*args)
        outputs, fakes = (run(*args) for run in (op.reference, op.fake))
        for out, fake in zip(outputs, fakes, strict=True) if isinstance(outputs, tuple) else ((outputs, fakes),):
            assert out.dtype is fake.dtype and out.isfinite().all()
