"""LayerNorm where several products read its result; one product alone takes it as `ops.linear`'s layer_norm."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ldmfast.ops import native, speeds
from ldmfast.ops.checks import require_device, require_dtype, require_float, require_shape
from ldmfast.ops.operator import Op

NAME = "layer_norm"


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float = 1e-5,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimension.

    x             [..., K]   float16 | bfloat16 | float32 (float64: the reference)
    weight, bias  [K]        dtype of x; None: 1 and 0
    returns       [..., K]   dtype of x, dense; statistics are float32, two-pass

    Raises TypeError for what is no tensor; ValueError naming the argument for a wrong shape, dtype or device, or an
    unknown backend; NotImplementedError with the reason of each backend that refuses.
    Traffic: 2 * x bytes.   Source: Ba, Kiros & Hinton 2016.
    """
    return op(*_arguments(x, weight, bias, eps), backend)


def _arguments(x, weight, bias, eps=1e-5):
    return x, weight, bias, eps


def _check(x, weight, bias, eps):
    if x.dim() < 1:
        raise ValueError(f"{NAME}: x has shape [], expected [..., K]")
    require_float(NAME, "x", x)
    require_device(NAME, "x", x.device, weight=weight, bias=bias)
    require_dtype(NAME, (x.dtype,), weight=weight, bias=bias)
    for name, tensor in (("weight", weight), ("bias", bias)):
        require_shape(NAME, name, tensor, x.shape[-1:], "[K]")
    if not eps > 0:
        raise ValueError(f"{NAME}: eps is {eps}, expected more than 0")


def _empty(x):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _fake(x, *others):
    return _empty(x)


def _autocast(dtype, x, weight, bias, eps):
    """In float32, as autocast has torch's own."""
    if x.dtype is torch.float64:
        return x, weight, bias, eps
    return *[None if tensor is None else tensor.float() for tensor in (x, weight, bias)], eps


def _example(dtype, device):
    """The first level's tokens."""
    generator = torch.Generator().manual_seed(0)
    tensors = (torch.randn(shape, generator=generator).to(device, dtype) for shape in ((1, 4096, 320), 320, 320))
    return _arguments(*tensors)


op = Op(
    NAME,
    "(Tensor x, Tensor? weight, Tensor? bias, float eps) -> Tensor",
    check=_check,
    fake=_fake,
    autocast=_autocast,
    normalise=_arguments,
    example=_example,
)
layer_norm.op = op


@op.backend("torch")
def _reference(x, weight, bias, eps):
    return layer_norm_formula(x, weight, bias, eps).contiguous()


def layer_norm_formula(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """torch's LayerNorm of x [..., K]; where its gradient will be asked for, one whose sums are in float32.

    On the CPU torch adds up the gradients of a 16-bit weight and bias in their own type: over 4096 rows, bfloat16's
    were 5 % off.
    """
    if torch.is_grad_enabled() and x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16):
        parameters = (None if tensor is None else tensor.float() for tensor in (weight, bias))
        return F.layer_norm(x.float(), x.shape[-1:], *parameters, eps).to(x.dtype)
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def _native(extension, x, weight, bias, eps):
    y = _empty(x)
    if y.numel() == 0:
        return y
    rows = x.reshape(-1, x.shape[-1])
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    fields = {
        "x": rows,
        "stride_x": rows.stride(0),
        "y": y,
        "weight": None if weight is None else weight.contiguous(),
        "bias": None if bias is None else bias.contiguous(),
        "M": rows.shape[0],
        "K": rows.shape[1],
        "eps": eps,
        "dtype": native.DTYPES[x.dtype],
    }
    extension.layer_norm(fields, *native.place(x))
    return y


native.register(op, _native, modules=("cpu",))
speeds.register(op, lambda x, *others: {"M": x.shape[:-1].numel(), "K": x.shape[-1]})
