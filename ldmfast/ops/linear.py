"""A linear layer with what a transformer puts before and after it: LayerNorm, activation, residual, scale."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ldmfast.ops import native, speeds, triton_backend
from ldmfast.ops.checks import require_device, require_dtype, require_float, require_layer_norm, require_shape
from ldmfast.ops.contract.switch import exact
from ldmfast.ops.gradients.products import linear_gradients
from ldmfast.ops.layer_norm import layer_norm_formula
from ldmfast.ops.operator import Op

NAME = "linear"
ACTIVATIONS = {"none": 0, "silu": 1, "gelu": 2, "geglu": 3}  # the codes of csrc/ops.h


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    residual: torch.Tensor | None = None,
    activation: str = "none",
    output_scale: float = 1.0,
    layer_norm: tuple[torch.Tensor | None, torch.Tensor | None, float] | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """(activation(LayerNorm(x) weight^T + bias) + residual) * output_scale in one op.

    x             [..., K]   float16 | bfloat16 | float32 (float64: the reference)
    weight, bias  [N, K], [N]   dtype of x; [2N, K] and [2N] with geglu; bias may be None
    residual      [..., N]   dtype of x, added after the activation
    activation    none | silu | gelu (with erf) | geglu: h * gelu(g), h the first N outputs of the layer, g the others
    output_scale  a factor for the whole result
    layer_norm    (weight [K] or None, bias [K] or None, eps): x is normalised over K first; dtype of x
    returns       [..., N]   dtype of x, dense; sums and statistics are float32

    Raises TypeError for what is no tensor; ValueError naming the argument for a wrong shape, dtype or device, an
    unknown activation or backend; NotImplementedError with the reason of each backend that refuses.
    Work: 2 * M * N * K operations for M rows.   Source: Shazeer 2020 (GEGLU); Ba et al. 2016 (LayerNorm).
    """
    return op(*_arguments(x, weight, bias, residual, activation, output_scale, layer_norm), backend)


def _arguments(x, weight, bias=None, residual=None, activation="none", output_scale=1.0, layer_norm=None):
    if layer_norm is not None and (not isinstance(layer_norm, (tuple, list)) or len(layer_norm) != 3):
        raise TypeError(f"{NAME}: layer_norm is {layer_norm!r:.80}, expected (weight, bias, eps) or None")
    norm_weight, norm_bias, eps = layer_norm or (None, None, None)
    return x, weight, bias, residual, activation, float(output_scale), norm_weight, norm_bias, eps


def _outputs(weight, activation):
    """N: the features that come out."""
    return weight.shape[0] // 2 if activation == "geglu" else weight.shape[0]


def _check(x, weight, bias, residual, activation, output_scale, norm_weight, norm_bias, eps):
    if activation not in ACTIVATIONS:
        raise ValueError(f"{NAME}: activation is {activation!r}, expected {', '.join(ACTIVATIONS)}")
    if x.dim() < 1:
        raise ValueError(f"{NAME}: x has shape [], expected [..., K]")
    require_float(NAME, "x", x)
    K = x.shape[-1]
    tensors = {"weight": weight, "bias": bias, "residual": residual, "norm_weight": norm_weight, "norm_bias": norm_bias}
    require_device(NAME, "x", x.device, **tensors)
    require_dtype(NAME, (x.dtype,), **tensors)
    if weight.dim() != 2 or weight.shape[1] != K:
        raise ValueError(f"{NAME}: weight has shape {list(weight.shape)}, expected [N, K] = [N, {K}]")
    if activation == "geglu" and weight.shape[0] % 2:
        raise ValueError(f"{NAME}: weight has {weight.shape[0]} rows, expected an even number for geglu")
    require_shape(NAME, "bias", bias, (weight.shape[0],), "a number a row of weight")
    require_shape(NAME, "residual", residual, (*x.shape[:-1], _outputs(weight, activation)), "[..., N]")
    require_layer_norm(NAME, K, norm_weight, norm_bias, eps)


def _empty(x, weight, activation):
    return x.new_empty(*x.shape[:-1], _outputs(weight, activation))


def _fake(x, weight, bias, residual, activation, *others):
    return _empty(x, weight, activation)


def _autocast(dtype, x, weight, bias, residual, activation, output_scale, norm_weight, norm_bias, eps):
    def cast(tensor):
        return tensor if tensor is None or x.dtype is torch.float64 else tensor.to(dtype)

    x_, weight, bias, residual = cast(x), cast(weight), cast(bias), cast(residual)
    return x_, weight, bias, residual, activation, output_scale, cast(norm_weight), cast(norm_bias), eps


def _example(dtype, device):
    """An attention's output layer at 32x32, with its residual."""
    generator = torch.Generator().manual_seed(0)
    shapes = (1, 1024, 640), (640, 640), (640,), (1, 1024, 640)
    x, weight, bias, residual = (torch.randn(shape, generator=generator) for shape in shapes)
    x, weight, bias, residual = (tensor.to(device, dtype) for tensor in (x, weight * 640**-0.5, bias, residual))
    return _arguments(x, weight, bias, residual=residual)


op = Op(
    NAME,
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, str activation, float output_scale, "
    "Tensor? norm_weight, Tensor? norm_bias, float? eps) -> Tensor",
    check=_check,
    fake=_fake,
    autocast=_autocast,
    normalise=_arguments,
    example=_example,
)
linear.op = op


def _activate(y, activation):
    if activation == "geglu":
        h, g = y.chunk(2, dim=-1)
        return h * F.gelu(g)
    return {"none": lambda y: y, "silu": F.silu, "gelu": F.gelu}[activation](y)


@op.backend("torch")
def _reference(x, weight, bias, residual, activation, output_scale, norm_weight, norm_bias, eps):
    h = x if eps is None else layer_norm_formula(x, norm_weight, norm_bias, eps)
    y = _activate(F.linear(h, weight, bias), activation)
    if residual is not None:
        y = y + residual
    y = y if output_scale == 1.0 else y * output_scale
    return y if y.is_contiguous() else y.contiguous()


def rows(tensor: torch.Tensor) -> torch.Tensor:
    """[..., K] as [M, K] of unit stride in K; a view where there is one."""
    found = tensor.reshape(-1, tensor.shape[-1])
    return found if found.stride(1) == 1 else found.contiguous()


def _native(extension, x, weight, bias, residual, activation, output_scale, norm_weight, norm_bias, eps):
    out = _empty(x, weight, activation)
    if out.numel() == 0:
        return out
    N, x = out.shape[-1], rows(x)
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    residual = None if residual is None else rows(residual)
    bias, norm_weight, norm_bias = (None if t is None else t.contiguous() for t in (bias, norm_weight, norm_bias))
    fields = {
        "x": x,
        "stride_x": x.stride(0),
        "weight": weight,
        "stride_w": weight.stride(0),
        "bias": bias,
        "residual": residual,
        "stride_residual": 0 if residual is None else residual.stride(0),
        "out": out,
        "stride_out": N,
        "norm_weight": norm_weight,
        "norm_bias": norm_bias,
        "eps": eps or 0.0,
        "normalised": eps is not None,
        "M": x.shape[0],
        "N": N,
        "K": x.shape[1],
        "activation": ACTIVATIONS[activation],
        "output_scale": output_scale,
        "exact": exact(),
        "dtype": native.DTYPES[x.dtype],
    }
    extension.linear(fields, *native.place(x))
    return out


native.register(op, _native, modules=("cpu",))


def _triton(kernel, x, weight, bias, residual, activation, output_scale, norm_weight, norm_bias, eps):
    out = _empty(x, weight, activation)
    if out.numel():
        tensors = [None if tensor is None else rows(tensor) for tensor in (x, weight, residual)]
        vectors = [None if tensor is None else tensor.contiguous() for tensor in (bias, norm_weight, norm_bias)]
        x, weight, residual = tensors
        bias, *norm = vectors
        kernel(x, weight, bias, residual, out.view(-1, out.shape[-1]), activation, output_scale, *norm, eps)
    return out


triton_backend.register(op, _triton)
for _name in ("cpu", "triton"):
    op.backends[_name].refuses(lambda x, *others: "K is 0: there is nothing to sum" if x.shape[-1] == 0 else None)


def _sizes(x, weight, bias, residual, activation, output_scale, norm_weight, norm_bias, eps):
    folded = (residual is not None) + (activation != "none") + (eps is not None)
    lanes = 0 if native.missing("cpu") else native.lanes()
    return {
        "M": x.shape[:-1].numel(),
        "K": weight.shape[1],
        "C": weight.shape[0],
        "lanes": lanes,
        "pairs": native.pairs(),
        "tiles": native.tiles(x.dtype),
        "folded": folded,
        "narrow": int(max(weight.shape) <= min(8, lanes)),
    }


speeds.register(op, _sizes)


@op.gradient()
def _gradient(grads, args, outputs, needed, backend):
    """Plain products where nothing but bias and scale is fused; else the reference's formula is differentiated."""
    x, weight, bias, residual, activation, output_scale, norm_weight, norm_bias, eps = args
    if activation != "none" or eps is not None or residual is not None:
        return None
    g = grads[0] if output_scale == 1.0 else grads[0] * output_scale
    return *linear_gradients(g, x, weight, needed), *[None] * 6
