"""A convolution with what a U-Net puts around it: norm and SiLU, a second input, enlargement, time, residual, scale."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ldmfast.ops import native, speeds
from ldmfast.ops.checks import require_device, require_dtype, require_float, require_shape
from ldmfast.ops.contract import switch
from ldmfast.ops.dispatcher import vmapped
from ldmfast.ops.gradients import conv2d_weight_backward
from ldmfast.ops.gradients.products import computed_in, convolution_gradients
from ldmfast.ops.operator import Op

NAME = "conv2d"
FORMS = {"auto": 0, "direct": 1, "f2": 2, "f4": 3}  # the codes of csrc/ops.h; f2 and f4 are Winograd's


def conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    stride: int = 1,
    padding: int = 0,
    x2: torch.Tensor | None = None,
    add: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    output_scale: float = 1.0,
    upsample: int = 1,
    norm_scale: torch.Tensor | None = None,
    norm_shift: torch.Tensor | None = None,
    norm_silu: bool = False,
    exact: bool = False,
    backend: str | None = None,
) -> torch.Tensor:
    """(conv(up(act([x, x2] * norm_scale + norm_shift))) + bias + add + residual) * output_scale in one op.

    x             [N, C1, H, W]   float16 | bfloat16 | float32 (float64: the reference); kernels take channels_last
                  (a copy is made of another layout)
    x2            [N, C2, H, W]   more channels of the input, in place of a concatenation; dtype of x
    weight, bias  [Co, Ci, k, k], [Co]   Ci = C1 + C2; any layout; dtype of x; bias may be None
    stride, padding   of the convolution, in pixels, both directions alike; zeros outside
    add           [N, Co]         added to every pixel of a channel (the time embedding); dtype of x
    residual      [N, Co, Ho, Wo] dtype of x;  Ho = (upsample * H + 2 * padding - k) // stride + 1, Wo likewise
    output_scale  a factor for the whole result
    upsample      1 | 2: the input is enlarged so many times first (nearest)
    norm_scale, norm_shift   [N, Ci], float32 (float64 beside a float64 x): GroupNorm of the input folded into a factor
                  and a shift for each channel of each sample; both or neither
    norm_silu     SiLU after norm_scale and norm_shift
    exact         leaves Winograd's forms out. They are exact but for rounding: F(4x4, 3x3) in float32 arithmetic,
                  below 1e-6; where the processor multiplies bfloat16 (AVX512-BF16, not AMX), F(2x2, 3x3) in that, whose
                  transformed operands are rounded: 3.3e-3 to 4.6e-3 against 1.7e-3 to 2.2e-3 of direct.
                  ldmfast.numerics("exact") does so everywhere
    returns       [N, Co, Ho, Wo] dtype of x, channels_last, dense; sums are float32

    Raises TypeError for what is no tensor; ValueError naming the argument for a wrong shape, dtype or device, or an
    unknown backend; NotImplementedError with the reason of each backend that refuses.
    Work: 2 * N * Ho * Wo * Co * Ci * k * k operations, where direct.   Source: Lavin & Gray 2015 (Winograd's forms).
    """
    tensors = x, weight, bias, x2, add, residual, norm_scale, norm_shift
    return op(*_arguments(*tensors, norm_silu, stride, padding, upsample, output_scale, exact), backend)


def _arguments(
    x,
    weight,
    bias=None,
    x2=None,
    add=None,
    residual=None,
    norm_scale=None,
    norm_shift=None,
    norm_silu=False,
    stride=1,
    padding=0,
    upsample=1,
    output_scale=1.0,
    exact=False,
):
    tensors = x, weight, bias, x2, add, residual, norm_scale, norm_shift
    return *tensors, norm_silu, stride, padding, upsample, float(output_scale), exact


def _size(x, weight, stride, padding, upsample):
    """(N, Co, Ho, Wo)"""
    k = weight.shape[2]
    Ho, Wo = ((upsample * side + 2 * padding - k) // stride + 1 for side in x.shape[2:])
    return x.shape[0], weight.shape[0], Ho, Wo


def _check(x, weight, bias, x2, add, residual, norm_scale, norm_shift, norm_silu, stride, padding, upsample, *others):
    if x.dim() != 4:
        raise ValueError(f"{NAME}: x has shape {list(x.shape)}, expected [N, C1, H, W]")
    require_float(NAME, "x", x)
    tensors = {"weight": weight, "bias": bias, "x2": x2, "add": add, "residual": residual}
    require_device(NAME, "x", x.device, **tensors, norm_scale=norm_scale, norm_shift=norm_shift)
    require_dtype(NAME, (x.dtype,), **tensors)
    table = torch.float64 if x.dtype is torch.float64 else torch.float32
    require_dtype(NAME, (table,), norm_scale=norm_scale, norm_shift=norm_shift)
    for name, value, least in (("stride", stride, 1), ("padding", padding, 0)):
        if value < least:
            raise ValueError(f"{NAME}: {name} is {value}, expected at least {least}")
    if upsample not in (1, 2):
        raise ValueError(f"{NAME}: upsample is {upsample}, expected 1 or 2")
    N, C1, H, W = x.shape
    if x2 is not None and (x2.dim() != 4 or (x2.shape[0], *x2.shape[2:]) != (N, H, W)):
        raise ValueError(f"{NAME}: x2 has shape {list(x2.shape)}, expected [N, C2, H, W] = [{N}, C2, {H}, {W}]")
    Ci = C1 + (0 if x2 is None else x2.shape[1])
    if weight.dim() != 4 or weight.shape[1] != Ci or weight.shape[2] != weight.shape[3]:
        raise ValueError(f"{NAME}: weight has shape {list(weight.shape)}, expected [Co, Ci, k, k] = [Co, {Ci}, k, k]")
    out = _size(x, weight, stride, padding, upsample)
    if out[2] < 1 or out[3] < 1:
        raise ValueError(f"{NAME}: x has shape {list(x.shape)}, too small for weight {list(weight.shape)}")
    require_shape(NAME, "bias", bias, out[1:2], "[Co]")
    require_shape(NAME, "add", add, out[:2], "[N, Co]")
    require_shape(NAME, "residual", residual, out, "[N, Co, Ho, Wo]")
    if (norm_scale is None) != (norm_shift is None):
        raise ValueError(f"{NAME}: one of norm_scale and norm_shift is None, expected both or neither")
    require_shape(NAME, "norm_scale", norm_scale, (N, Ci), "[N, Ci]")
    require_shape(NAME, "norm_shift", norm_shift, (N, Ci), "[N, Ci]")
    if norm_silu and norm_scale is None:
        raise ValueError(f"{NAME}: norm_silu is True beside norm_scale None, expected a norm")


def _empty(x, size):
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _fake(x, weight, bias, x2, add, residual, norm_scale, norm_shift, norm_silu, stride, padding, upsample, *others):
    return _empty(x, _size(x, weight, stride, padding, upsample))


def _autocast(dtype, x, weight, bias, x2, add, residual, *others):
    if x.dtype is torch.float64:
        return x, weight, bias, x2, add, residual, *others
    return *[None if t is None else t.to(dtype) for t in (x, weight, bias, x2, add, residual)], *others


def _example(dtype, device):
    """The first level's last convolution of a residual block, an eighth of the picture."""
    generator = torch.Generator().manual_seed(0)
    x, weight, bias, residual = (
        torch.randn(shape, generator=generator) for shape in ((1, 320, 8, 64), (320, 320, 3, 3), 320, (1, 320, 8, 64))
    )
    x, weight, bias, residual = (t.to(device, dtype) for t in (x, weight * (320 * 9) ** -0.5, bias, residual))
    return _arguments(x.contiguous(memory_format=torch.channels_last), weight, bias, padding=1, residual=residual)


op = Op(
    NAME,
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? x2, Tensor? add, Tensor? residual, Tensor? norm_scale, "
    "Tensor? norm_shift, bool norm_silu, int stride, int padding, int upsample, float output_scale, bool exact) "
    "-> Tensor",
    check=_check,
    fake=_fake,
    autocast=_autocast,
    normalise=_arguments,
    example=_example,
)
conv2d.op = op


def _input(x, x2, norm_scale, norm_shift, norm_silu, upsample):
    h = x if x2 is None else torch.cat([x, x2], dim=1)
    if norm_scale is not None:
        h = (h * norm_scale[:, :, None, None] + norm_shift[:, :, None, None]).to(x.dtype)
        h = F.silu(h) if norm_silu else h
    return h if upsample == 1 else F.interpolate(h, scale_factor=float(upsample), mode="nearest")


@op.backend("torch")
def _reference(x, weight, bias, x2, add, residual, norm_scale, norm_shift, norm_silu, *numbers):
    stride, padding, upsample, output_scale, exact = numbers
    y = F.conv2d(_input(x, x2, norm_scale, norm_shift, norm_silu, upsample), weight, bias, stride, padding)
    y = y if add is None else y + add[:, :, None, None]
    y = y if residual is None else y + residual
    y = y if output_scale == 1.0 else y * output_scale
    if vmapped():
        return y
    C, H, W = y.shape[1:]
    if C * H * W > 1 and y.stride() == (C * H * W, 1, C * W, C):  # channels_last already
        return y
    out = torch.empty_like(y, memory_format=torch.channels_last)
    return y if y.stride() == out.stride() else out.copy_(y)


def _channels_last(x):
    """x with unit stride in its channels: a copy only where it has another."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous(memory_format=torch.channels_last)


def _nhw(tensor, name):
    N, _, H, W = (0, 0, 0, 0) if tensor is None else tensor.stride()
    return {name: tensor, f"stride_{name}n": N, f"stride_{name}h": H, f"stride_{name}w": W}


def _native(extension, x, weight, bias, x2, add, residual, norm_scale, norm_shift, norm_silu, *numbers):
    stride, padding, upsample, output_scale, exact = numbers
    out = _empty(x, _size(x, weight, stride, padding, upsample))
    if out.numel() == 0:
        return out
    x2 = None if x2 is None or x2.shape[1] == 0 else _channels_last(x2)
    if residual is not None:  # dense
        residual = residual.contiguous(memory_format=torch.channels_last)
    if add is not None and add.stride(1) != 1:
        add = add.contiguous()
    bias, norm_scale, norm_shift = (None if t is None else t.contiguous() for t in (bias, norm_scale, norm_shift))
    fields = {
        **_nhw(_channels_last(x), "x1"),
        **_nhw(x2, "x2"),
        "weight": weight,
        **{f"stride_w{name}": size for name, size in zip("oihw", weight.stride(), strict=True)},
        "bias": bias,
        "add": add,
        "stride_add": 0 if add is None else add.stride(0),
        "residual": residual,
        "norm_scale": norm_scale,
        "norm_shift": norm_shift,
        "out": out,
        **dict(zip(("N", "C1", "H", "W"), x.shape, strict=True)),
        "C2": 0 if x2 is None else x2.shape[1],
        **dict(zip(("Co", "Ho", "Wo"), out.shape[1:], strict=True)),
        "kernel": weight.shape[2],
        "stride": stride,
        "padding": padding,
        "upsample": upsample,
        "output_scale": output_scale,
        "silu": norm_silu,
        "form": FORMS["direct" if exact or switch.exact() else "auto"],
        "dtype": native.DTYPES[x.dtype],
    }
    extension.conv2d(fields, *native.place(x))
    return out


native.register(op, _native, modules=("cpu",))


@op.backends["cpu"].refuses
def _refusal(x, weight, *others):
    if weight.shape[2] not in (1, 3):
        return f"weight is {weight.shape[2]}x{weight.shape[3]}; the kernel takes 1x1 and 3x3"
    return "x has no channels: there is nothing to sum" if x.shape[1] == 0 else None


def _sizes(x, weight, bias, x2, add, residual, norm_scale, norm_shift, norm_silu, stride, padding, upsample, *others):
    N, Co, Ho, Wo = _size(x, weight, stride, padding, upsample)
    sizes = {"k": weight.shape[2], "stride": stride, "Ci": weight.shape[1], "Co": Co, "pixels": N * Ho * Wo}
    folded = sum(tensor is not None for tensor in (x2, add, residual, norm_scale)) + (upsample > 1)
    how = {"lanes": native.lanes(), "pairs": native.pairs(), "tiles": native.tiles(x.dtype)}
    narrow = weight.shape[2] == stride == 1 and padding == 0 and weight.shape[1] <= 8 and Co <= min(8, how["lanes"])
    return sizes | how | {"folded": folded, "narrow": int(narrow)}


speeds.register(op, _sizes)


@op.gradient()
def _gradient(grads, args, outputs, needed, backend):
    """The convolution's own where nothing is fused; else the reference's formula is differentiated."""
    x, weight, bias, *fused, norm_silu, stride, padding, upsample, output_scale, exact = args
    if any(tensor is not None for tensor in fused) or upsample != 1 or output_scale != 1.0:
        return None

    def convolve(g, turned, padding):
        return op(*_arguments(g, turned, padding=padding, exact=exact), backend)

    def weigh():
        return conv2d_weight_backward.op(*pair, padding, "cpu").to(weight.dtype)

    own = needed[1] and stride == 1 and weight.shape[2] == 3 and op.fused(args, backend)
    pair = [tensor.to(computed_in(tensor)) for tensor in (grads[0], x)] if own else []
    own = own and conv2d_weight_backward.runs(*pair, padding)
    found = convolution_gradients(grads[0], x, weight, stride, padding, needed, convolve, weigh if own else None)
    return *found, *[None] * 11
