"""A residual sum and the LayerNorm that reads it, in one pass: what follows a product that another library computes."""

from __future__ import annotations

import torch

from ldmfast.ops import native, triton_backend
from ldmfast.ops.checks import require_device, require_dtype, require_float, require_shape
from ldmfast.ops.layer_norm import layer_norm_formula
from ldmfast.ops.linear import rows
from ldmfast.ops.operator import Op

NAME = "residual_layer_norm"


def residual_layer_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float = 1e-5,
    *,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(s, LayerNorm(s) over the last dimension) with s = x + residual, as it is after rounding.

    x, residual   [..., K]   float16 | bfloat16 | float32 (float64: the reference), one dtype
    weight, bias  [K]        dtype of x; None: 1 and 0
    returns       [..., K]   twice, dtype of x, dense; statistics are float32, two-pass

    Raises TypeError for what is no tensor; ValueError naming the argument for a wrong shape, dtype or device, or an
    unknown backend; NotImplementedError with the reason of each backend that refuses.
    Traffic: 4 * x bytes.   Source: Ba, Kiros & Hinton 2016.
    """
    return op(*_arguments(x, residual, weight, bias, eps), backend)


def _arguments(x, residual, weight, bias, eps=1e-5):
    return x, residual, weight, bias, eps


def _check(x, residual, weight, bias, eps):
    if x.dim() < 1:
        raise ValueError(f"{NAME}: x has shape [], expected [..., K]")
    require_float(NAME, "x", x)
    require_device(NAME, "x", x.device, residual=residual, weight=weight, bias=bias)
    require_dtype(NAME, (x.dtype,), residual=residual, weight=weight, bias=bias)
    require_shape(NAME, "residual", residual, tuple(x.shape), "x's shape")
    for name, tensor in (("weight", weight), ("bias", bias)):
        require_shape(NAME, name, tensor, x.shape[-1:], "[K]")
    if not eps > 0:
        raise ValueError(f"{NAME}: eps is {eps}, expected more than 0")


def _empty(x):
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))


def _fake(x, *others):
    return _empty(x)


def _autocast(dtype, x, residual, weight, bias, eps):
    """In float32, as autocast has torch's own norm."""
    if x.dtype is torch.float64:
        return x, residual, weight, bias, eps
    return *[None if tensor is None else tensor.float() for tensor in (x, residual, weight, bias)], eps


def _example(dtype, device):
    """The first level's tokens."""
    generator = torch.Generator().manual_seed(0)
    shapes = (1, 4096, 320), (1, 4096, 320), 320, 320
    return _arguments(*(torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes))


op = Op(
    NAME,
    "(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor)",
    check=_check,
    fake=_fake,
    autocast=_autocast,
    normalise=_arguments,
    example=_example,
)
residual_layer_norm.op = op


@op.backend("torch")
def _reference(x, residual, weight, bias, eps):
    s = (x + residual).contiguous()
    return s, layer_norm_formula(s, weight, bias, eps).contiguous()


def _dense(x, residual, weight, bias):
    return rows(x), rows(residual), *(None if tensor is None else tensor.contiguous() for tensor in (weight, bias))


def _native(extension, x, residual, weight, bias, eps):
    s, y = _empty(x)
    if y.numel() == 0:
        return s, y
    x, residual, weight, bias = _dense(x, residual, weight, bias)
    fields = {
        "x": x,
        "stride_x": x.stride(0),
        "residual": residual,
        "stride_residual": residual.stride(0),
        "weight": weight,
        "bias": bias,
        "sum": s,
        "y": y,
        "M": x.shape[0],
        "K": x.shape[1],
        "eps": eps,
        "dtype": native.DTYPES[x.dtype],
    }
    extension.residual_layer_norm(fields, *native.place(x))
    return s, y


native.register(op, _native, modules=("cuda", "cuda-host"))


def _triton(kernel, x, residual, weight, bias, eps):
    s, y = _empty(x)
    if y.numel():
        kernel(*_dense(x, residual, weight, bias), s.view(-1, s.shape[-1]), y.view(-1, y.shape[-1]), eps)
    return s, y


@triton_backend.register(op, _triton).refuses
def _refusal(x, *others):
    return None if x.shape[-1] <= 16384 else f"K is {x.shape[-1]}; the kernel keeps a row in registers, at most 16384"
