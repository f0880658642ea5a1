"""The ops on the U-Net's shapes, each backend in turn with eager torch, beside a copy of the same bytes or a product.

pytest bench/bench_ops.py --benchmark-only                     all of it, about two minutes on two cores
pytest bench/bench_ops.py --benchmark-only -k "attention and bf16"
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from timing import Row, TooSlow, add_row, bear, borne, device, measure, measure_in_turn, name_of, rows_of

from ldmfast import ops
from ldmfast.ops import registry
from ldmfast.ops.registry import BACKWARD_OPS, OPS

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
BACKENDS = tuple(name for name in reversed(registry.BACKENDS) if name != "torch")  # eager is in every row


@dataclass(frozen=True)
class Case:
    """make(dtype) -> the op's (args, kwargs); eager: the same in plain torch; amount(dtype): bytes or operations.

    part(args, rows) -> args that make the part rows / whole of the work, for what a processor may be very slow at
    """

    op: str
    shape: str
    make: Callable
    eager: Callable
    amount: Callable
    unit: str = "GB/s"
    dtypes: tuple = (BF16, FP32)
    part: Callable | None = None
    whole: int = 1

    @property
    def label(self) -> str:
        return f"{self.op}-{self.shape}".replace(" ", "_")


def randn(*shape, dtype):
    return torch.randn(*shape, device=device()).to(dtype)


def group_norm(N, C, size, layout, dtypes=(BF16, FP32)) -> Case:
    def make(dtype):
        x = randn(N, C, size, size, dtype=dtype)
        x = x.contiguous(memory_format=torch.channels_last) if layout == "last" else x
        return (x, randn(C, dtype=dtype), randn(C, dtype=dtype), 32), {}

    def eager(x, weight, bias, groups):
        return F.silu(F.group_norm(x, groups, weight, bias))

    return Case(
        "group_norm_silu",
        f"{N}x{C}x{size}x{size} {layout}",
        make,
        eager,
        lambda dtype: 2 * N * C * size * size * dtype.itemsize,
        dtypes=dtypes,
    )


def attention(N, L, S, H, D, dtypes=(BF16,)) -> Case:
    def make(dtype):
        return (randn(N, L, H, D, dtype=dtype), randn(N, S, H, D, dtype=dtype), randn(N, S, H, D, dtype=dtype)), {}

    def eager(q, k, v):
        return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))

    def part(args, rows):
        return args[0][:, :rows], *args[1:]

    amount = 4 * N * L * S * H * D
    return Case("attention", f"{N}x{L}x{S} {H}x{D}", make, eager, lambda dtype: amount, "TFLOP/s", dtypes, part, L)


def timestep(N, dim, width) -> Case:
    def make(dtype):
        w1, w2 = randn(width, dim, dtype=dtype) / dim**0.5, randn(width, width, dtype=dtype) / width**0.5
        t = torch.arange(N, device=device()) * 500 + 1
        return (t, w1, randn(width, dtype=dtype), w2, randn(width, dtype=dtype)), {"dim": dim}

    def eager(t, w1, b1, w2, b2, *, dim):  # what diffusers' Timesteps and TimestepEmbedding do
        exponent = torch.arange(dim // 2, dtype=FP32, device=t.device) * (-math.log(10000.0) / (dim // 2))
        angle = t[:, None].float() * torch.exp(exponent)[None]
        row = torch.cat([torch.cos(angle), torch.sin(angle)], dim=-1).to(w1.dtype)
        return F.linear(F.silu(F.linear(row, w1, b1)), w2, b2)

    return Case(
        "timestep_mlp",
        f"{N} {dim}-{width}-{width}",
        make,
        eager,
        lambda dtype: (dim * width + width * width) * dtype.itemsize,
    )


def ddim(N, size) -> Case:
    def make(dtype):
        sample = randn(N, 4, size, size, dtype=dtype)
        return (sample, randn(2 * N, 4, size, size, dtype=dtype), 0.3, 0.5), {"guidance": 7.5}

    def eager(sample, output, alpha_t, alpha_prev, *, guidance):  # bench_sampler.py: diffusers' step
        uncond, cond = output.chunk(2)
        eps = uncond + guidance * (cond - uncond)
        x0 = (sample - (1 - alpha_t) ** 0.5 * eps) / alpha_t**0.5
        return alpha_prev**0.5 * x0 + (1 - alpha_prev) ** 0.5 * eps, x0

    return Case(
        "ddim_step", f"{N}x4x{size}x{size} guided", make, eager, lambda dtype: 5 * N * 4 * size * size * dtype.itemsize
    )


def linear(M, K, N, dtypes=(BF16, FP32)) -> Case:
    def make(dtype):
        return (randn(M, K, dtype=dtype), randn(N, K, dtype=dtype) / K**0.5, randn(N, dtype=dtype)), {}

    def part(args, rows):
        return args[0][:rows], *args[1:]

    return Case("linear", f"{M}x{K}-{N}", make, F.linear, lambda dtype: 2 * M * K * N, "TFLOP/s", dtypes, part, M)


def conv2d(Ci, Co, size, k=3, dtypes=(BF16, FP32)) -> Case:
    """layers.py has every shape of the U-Net."""

    def make(dtype):
        x = randn(1, Ci, size, size, dtype=dtype).contiguous(memory_format=torch.channels_last)
        weight = randn(Co, Ci, k, k, dtype=dtype) / (Ci * k * k) ** 0.5
        return (x, weight, randn(Co, dtype=dtype)), {"padding": k // 2}

    def part(args, rows):
        return args[0][:, :, :rows], *args[1:]

    amount = 2 * size * size * Ci * Co * k * k
    shape = f"{Ci}-{Co} {k}x{k} {size}x{size}"
    return Case("conv2d", shape, make, F.conv2d, lambda dtype: amount, "TFLOP/s", dtypes, part, size)


def around(op, shape, make, eager, amount) -> Case:
    """What stands around a product on a GPU; a CPU's module has none of these."""
    return Case(op, shape, make, eager, lambda dtype: amount * dtype.itemsize, dtypes=(BF16,))


def geglu(M, F_) -> Case:
    def eager(x):
        h, g = x.chunk(2, dim=-1)
        return h * F.gelu(g)

    return around("geglu", f"{M}x{F_}", lambda dtype: ((randn(M, 2 * F_, dtype=dtype),), {}), eager, 3 * M * F_)


def bias_residual(N, C, size) -> Case:
    def make(dtype):
        x, residual = (randn(N, C, size, size, dtype=dtype) for _ in "xr")
        x, residual = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, residual))
        return (x, randn(C, dtype=dtype)), {"residual": residual}

    def eager(x, bias, *, residual):
        return x + bias[:, None, None] + residual

    return around("bias_residual", f"{N}x{C}x{size}x{size} last", make, eager, 3 * N * C * size * size)


def residual_layer_norm(M, K) -> Case:
    def make(dtype):
        return (*(randn(M, K, dtype=dtype) for _ in "xr"), *(randn(K, dtype=dtype) for _ in "wb")), {}

    def eager(x, residual, weight, bias):
        s = x + residual
        return s, F.layer_norm(s, s.shape[-1:], weight, bias)

    return around("residual_layer_norm", f"{M}x{K}", make, eager, 4 * M * K)


def qkv_projection(M, K) -> Case:
    def make(dtype):
        weights = (randn(K, K, dtype=dtype) / K**0.5 for _ in range(3))
        return (randn(M, K, dtype=dtype), *weights), {
            "layer_norm": (randn(K, dtype=dtype), randn(K, dtype=dtype), 1e-5)
        }

    def eager(x, *weights, layer_norm):
        h = F.layer_norm(x, x.shape[-1:], *layer_norm)
        return [F.linear(h, weight) for weight in weights]

    amount = 6 * M * K * K
    return Case("qkv_projection", f"{M}x{K}", make, eager, lambda dtype: amount, "TFLOP/s", (BF16,))


CASES = (
    group_norm(2, 320, 64, "contiguous"),
    group_norm(2, 320, 64, "last"),
    group_norm(2, 640, 32, "last", (BF16,)),
    group_norm(2, 960, 32, "contiguous", (BF16,)),
    group_norm(2, 1280, 16, "last", (BF16,)),
    group_norm(2, 1280, 8, "contiguous", (BF16,)),
    group_norm(2, 2560, 8, "last", (BF16,)),
    attention(1, 4096, 4096, 8, 40, (BF16, FP32)),
    attention(1, 4096, 77, 8, 40, (BF16, FP32)),
    attention(1, 1024, 1024, 8, 80),
    attention(1, 1024, 77, 8, 80),
    attention(1, 256, 256, 8, 160),
    attention(1, 64, 64, 8, 160),
    attention(1, 1024, 1024, 20, 64),
    attention(1, 4096, 4096, 1, 512),
    timestep(2, 320, 1280),
    ddim(1, 64),
    ddim(8, 64),
    ddim(1, 128),
    linear(1024, 640, 640),
    linear(256, 1280, 10240, (BF16,)),
    conv2d(320, 320, 64),
    conv2d(640, 640, 32),
    conv2d(1280, 1280, 16, dtypes=(BF16,)),
    conv2d(640, 320, 64, 1, (BF16,)),
    qkv_projection(8192, 320),
    geglu(8192, 1280),
    bias_residual(2, 320, 64),
    residual_layer_norm(8192, 320),
)
PARAMS = [
    pytest.param(case, dtype, backend, id=f"{case.label}-{name_of(dtype)}-{backend}")
    for case in CASES
    for dtype in case.dtypes
    for backend in BACKENDS
]
EAGER: set[tuple[str, str, str]] = set()  # whose eager row is in the table


def copy(size: int) -> Callable:
    """A copy that reads and writes size bytes in all."""
    source = torch.ones(max(1, size // 2), dtype=torch.uint8, device=device())
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


@functools.cache
def matrix_size() -> int:
    return 8192 if device() == "cuda" else 2048


def product(dtype: torch.dtype) -> Callable:
    """A product of square matrices, or of the first rows of one."""
    a, b = (randn(matrix_size(), matrix_size(), dtype=dtype) for _ in "ab")
    return lambda rows=None: torch.mm(a[:rows], b)


ROOFS: dict[tuple, float] = {}  # bytes or operations per second


@pytest.mark.parametrize(
    "size", sorted({case.amount(dtype) for case in CASES for dtype in case.dtypes if case.unit == "GB/s"})
)
@torch.inference_mode()
def test_copy(benchmark, size):
    seconds = measure(benchmark, copy(size), seconds=0.1)
    ROOFS["GB/s", size] = size / seconds
    add_row(benchmark, Row("copy", "torch", f"{size} bytes", "", seconds, size, "GB/s"))


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=name_of)
@torch.inference_mode()
def test_matmul(benchmark, dtype):
    amount, shape = 2 * matrix_size() ** 3, f"{matrix_size()} cubed"
    call = product(dtype)
    if reason := borne(call, rows_of(matrix_size())):
        add_row(benchmark, Row("matmul", "torch", shape, name_of(dtype), None, amount, "TFLOP/s", note=reason))
        pytest.skip(reason)
    seconds = measure(benchmark, call)
    ROOFS["TFLOP/s", dtype] = amount / seconds
    add_row(benchmark, Row("matmul", "torch", shape, name_of(dtype), seconds, amount, "TFLOP/s"))


def in_turn(benchmark, name: str, case: Case, dtype, backend: str, calls_of: Callable, args, amount, roof) -> None:
    """Measures the two calls of calls_of(args), ours and eager's, and adds their rows."""
    shape = (case.shape, name_of(dtype))

    def part(which):
        return (lambda rows: calls_of(case.part(args, rows))[which]()) if case.part else None

    try:
        bear(part(0), rows_of(case.whole))
    except TooSlow as reason:
        add_row(benchmark, Row(name, backend, *shape, None, amount, case.unit, note=str(reason)))
        pytest.skip(f"{name}: {backend}: {reason}")
    note = borne(part(1), rows_of(case.whole))
    ours, eager = calls_of(args, not note)
    seconds, took, once = measure_in_turn(benchmark, ours, eager)
    if (name, *shape) not in EAGER:
        EAGER.add((name, *shape))
        add_row(benchmark, Row(name, "eager", *shape, took, amount, case.unit, roof, note=note or once))
    add_row(benchmark, Row(name, backend, *shape, seconds, amount, case.unit, roof, took))


@pytest.mark.parametrize("case, dtype, backend", PARAMS)
@torch.inference_mode()
def test_op(benchmark, case, dtype, backend):
    torch.manual_seed(0)
    args, kwargs = case.make(dtype)
    op = OPS[case.op]
    found = op.backends.get(backend)
    reason = "has no such kernel" if found is None else found.refusal(op.normalise(*args, **kwargs))
    if reason:
        pytest.skip(f"{case.op}: {backend}: {reason}")
    roof = ROOFS.get((case.unit, dtype if case.unit == "TFLOP/s" else case.amount(dtype)))

    def calls_of(args, eager=True):
        ours = functools.partial(getattr(ops, case.op), *args, **kwargs, backend=backend)
        return ours, functools.partial(case.eager, *args, **kwargs) if eager else None

    in_turn(benchmark, case.op, case, dtype, backend, calls_of, args, case.amount(dtype), roof)


BACKWARD = (
    group_norm(2, 320, 64, "contiguous"),
    group_norm(2, 320, 64, "last"),
    group_norm(2, 1280, 8, "last", (BF16,)),
    attention(1, 4096, 4096, 8, 40),
    attention(1, 4096, 77, 8, 40),
    attention(1, 1024, 1024, 8, 80),
    attention(1, 256, 256, 8, 160),
    timestep(2, 320, 1280),
)
BACKWARD_PARAMS = [
    pytest.param(case, dtype, backend, id=f"backward-{case.label}-{name_of(dtype)}-{backend}")
    for case in BACKWARD
    for dtype in case.dtypes
    for backend in BACKENDS
]
# of the forward's bytes or operations: 3 reads and writes for 2; 5 products for 2; the weights' gradients, too
SHARE = {"group_norm_silu": 1.5, "attention": 2.5, "timestep_mlp": 2.0}


def forward_inputs(case, dtype, args=None):
    """(the op, what it is run with)"""
    torch.manual_seed(0)
    made, kwargs = case.make(dtype)
    return OPS[case.op], OPS[case.op].normalise(*(args or made), **kwargs)


def gradient_inputs(case, dtype, args=None):
    """(the backward op, what it is run with)"""
    op, inputs = forward_inputs(case, dtype, args)
    out = op.run(*inputs, None)
    grad = torch.randn_like(out)
    return BACKWARD_OPS[f"{op.name}_backward"], [
        grad,
        *((*inputs[:3], out, *inputs[3:]) if case.op == "attention" else inputs),
    ]


def recorded(case, args, kwargs, grad):
    """A call that differentiates eager's graph, which is kept. grad: the output's gradient, as ours takes it."""
    wanted = [a.detach().requires_grad_() for a in args if isinstance(a, torch.Tensor) and a.is_floating_point()]
    values = iter(wanted)
    args = [next(values) if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
    grad = grad.transpose(1, 2) if case.op == "attention" else grad  # eager's output is [N, H, L, D]
    out = case.eager(*args, **kwargs)
    return lambda: torch.autograd.grad(out, wanted, grad, retain_graph=True)


@pytest.mark.parametrize("case, dtype, backend", BACKWARD_PARAMS)
def test_backward(benchmark, case, dtype, backend):
    """The gradient alone: ours, the backward op; eager's, autograd through a graph that is kept."""
    torch.manual_seed(0)
    args, kwargs = case.make(dtype)
    few = case.part(args, 1) if case.part else args
    backward, inputs = gradient_inputs(case, dtype, few)
    found = backward.backends.get(backend)
    reason = "has no such kernel" if found is None else found.refusal(inputs)
    if reason:
        pytest.skip(f"{backward.name}: {backend}: {reason}")
    roof = ROOFS.get((case.unit, dtype)) if case.unit == "TFLOP/s" else None

    def calls_of(args, eager=True):
        inputs = gradient_inputs(case, dtype, args)[1]
        ours = functools.partial(backward.run, *inputs, backend)
        return ours, recorded(case, args, kwargs, inputs[0]) if eager else None

    amount = case.amount(dtype) * SHARE[case.op]
    in_turn(benchmark, backward.name, case, dtype, backend, calls_of, args, amount, roof)
