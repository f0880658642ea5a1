"""Two or three linear layers of one input in one product: queries, keys and values, or a prompt's keys and values."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ldmfast.ops import speeds, triton_backend
from ldmfast.ops.checks import require_device, require_dtype, require_float, require_layer_norm, require_shape
from ldmfast.ops.layer_norm import layer_norm_formula
from ldmfast.ops.linear import rows
from ldmfast.ops.operator import Op

NAME = "qkv_projection"


def qkv_projection(
    x: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    third: torch.Tensor | None = None,
    *,
    layer_norm: tuple[torch.Tensor | None, torch.Tensor | None, float] | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """LayerNorm(x) times each weight, side by side. The weights stay where they are: nothing of them is kept or copied.

    x                     [..., K]   float16 | bfloat16 | float32 (float64: the reference)
    first, second, third  [N, K]     dtype of x; third may be None
    layer_norm            (weight [K] or None, bias [K] or None, eps): x is normalised over K first; dtype of x
    returns               [..., 2, N] or [..., 3, N]   dtype of x, dense; sums and statistics are float32

    Raises TypeError for what is no tensor; ValueError naming the argument for a wrong shape, dtype or device, or an
    unknown backend; NotImplementedError with the reason of each backend that refuses.
    Work: 2 * M * K * N operations a weight for M rows.   Source: Vaswani et al. 2017, section 3.2.2.
    """
    return op(*_arguments(x, first, second, third, layer_norm=layer_norm), backend)


def _arguments(x, first, second, third=None, *, layer_norm=None):
    if layer_norm is not None and (not isinstance(layer_norm, (tuple, list)) or len(layer_norm) != 3):
        raise TypeError(f"{NAME}: layer_norm is {layer_norm!r:.80}, expected (weight, bias, eps) or None")
    norm_weight, norm_bias, eps = layer_norm or (None, None, None)
    return x, first, second, third, norm_weight, norm_bias, eps


def _check(x, first, second, third, norm_weight, norm_bias, eps):
    if x.dim() < 1:
        raise ValueError(f"{NAME}: x has shape [], expected [..., K]")
    require_float(NAME, "x", x)
    K = x.shape[-1]
    tensors = {"first": first, "second": second, "third": third, "norm_weight": norm_weight, "norm_bias": norm_bias}
    require_device(NAME, "x", x.device, **tensors)
    require_dtype(NAME, (x.dtype,), **tensors)
    if first.dim() != 2 or first.shape[1] != K:
        raise ValueError(f"{NAME}: first has shape {list(first.shape)}, expected [N, K] = [N, {K}]")
    for name, tensor in (("second", second), ("third", third)):
        require_shape(NAME, name, tensor, tuple(first.shape), "first's shape")
    require_layer_norm(NAME, K, norm_weight, norm_bias, eps)


def _empty(x, first, third):
    return x.new_empty(*x.shape[:-1], 2 if third is None else 3, first.shape[0])


def _fake(x, first, second, third, *others):
    return _empty(x, first, third)


def _autocast(dtype, x, first, second, third, norm_weight, norm_bias, eps):
    def cast(tensor):
        return tensor if tensor is None or x.dtype is torch.float64 else tensor.to(dtype)

    return *map(cast, (x, first, second, third, norm_weight, norm_bias)), eps


def _example(dtype, device):
    """The self-attention of the second level, behind its LayerNorm."""
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 256, 640), (640, 640), (640, 640), (640, 640), (640,), (640,)
    x, *tensors = (torch.randn(shape, generator=generator) for shape in shapes)
    x, *weights, norm_weight, norm_bias = (
        x.to(device, dtype),
        *((tensor * 640**-0.5).to(device, dtype) for tensor in tensors[:3]),
        *(tensor.to(device, dtype) for tensor in tensors[3:]),
    )
    return _arguments(x, *weights, layer_norm=(norm_weight, norm_bias, 1e-5))


op = Op(
    NAME,
    "(Tensor x, Tensor first, Tensor second, Tensor? third, Tensor? norm_weight, Tensor? norm_bias, float? eps) "
    "-> Tensor",
    check=_check,
    fake=_fake,
    autocast=_autocast,
    normalise=_arguments,
    example=_example,
)
qkv_projection.op = op


@op.backend("torch")
def _reference(x, first, second, third, norm_weight, norm_bias, eps):
    h = x if eps is None else layer_norm_formula(x, norm_weight, norm_bias, eps)
    weights = (first, second) if third is None else (first, second, third)
    return torch.stack([F.linear(h, weight) for weight in weights], dim=-2)


def _triton(kernel, x, first, second, third, norm_weight, norm_bias, eps):
    out = _empty(x, first, third)
    if out.numel():
        weights = [rows(weight) for weight in (first, second, third) if weight is not None]
        norm = (None if tensor is None else tensor.contiguous() for tensor in (norm_weight, norm_bias))
        kernel(rows(x), weights, out.view(-1, len(weights) * first.shape[0]), *norm, eps)
    return out


triton_backend.register(op, _triton).refuses(
    lambda x, *others: "K is 0: there is nothing to sum" if x.shape[-1] == 0 else None
)
speeds.register(op, lambda x, *others: {"M": x.shape[:-1].numel()})
