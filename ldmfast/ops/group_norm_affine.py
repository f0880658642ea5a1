"""GroupNorm as a factor and a shift for each channel of each sample, which `ops.conv2d` applies to its input."""

from __future__ import annotations

import torch

from ldmfast.ops import native
from ldmfast.ops.checks import require_device, require_dtype, require_float, require_shape
from ldmfast.ops.group_norm_silu import in_one_dtype
from ldmfast.ops.operator import Op

NAME = "group_norm_affine"


def group_norm_affine(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    groups: int,
    eps: float = 1e-5,
    *,
    x2: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The norm_scale and norm_shift of `ops.conv2d`: x * norm_scale + norm_shift is GroupNorm(x) * (1 + scale) + shift.

    x             [N, C1, H, W]  float16 | bfloat16 | float32 (float64: the reference); the kernel takes channels_last
                  (a copy is made of another layout)
    x2            [N, C2, H, W]  more channels, in place of a concatenation; dtype of x
    weight, bias  [C]            C = C1 + C2; dtype of x, or float32; None: 1 and 0
    groups        channels are normalised in this many groups, which may lie in both
    scale, shift  [N, C]         modulate after the affine; dtype of x, or float32
    returns       (norm_scale [N, C], norm_shift [N, C], moments [N, groups, 2]): the first two float32 (float64 for a
                  float64 x), the moments float64, mean and variance of each group

    Raises TypeError for what is no tensor; ValueError naming the argument for a wrong shape, dtype or device, for
    C % groups, or an unknown backend; NotImplementedError with the reason of each backend that refuses.
    Traffic: x and x2 once.   Source: Wu & He 2018, section 3.
    """
    return op(*_arguments(x, weight, bias, groups, eps, x2=x2, scale=scale, shift=shift), backend)


def _arguments(x, weight, bias, groups, eps=1e-5, *, x2=None, scale=None, shift=None):
    return x, weight, bias, groups, eps, x2, scale, shift


def _check(x, weight, bias, groups, eps, x2, scale, shift):
    if x.dim() != 4:
        raise ValueError(f"{NAME}: x has shape {list(x.shape)}, expected [N, C1, H, W]")
    require_float(NAME, "x", x)
    require_device(NAME, "x", x.device, weight=weight, bias=bias, x2=x2, scale=scale, shift=shift)
    require_dtype(NAME, (x.dtype,), x2=x2)
    require_dtype(NAME, (x.dtype, torch.float32), weight=weight, bias=bias, scale=scale, shift=shift)
    N, C, H, W = x.shape
    if x2 is not None and (x2.dim() != 4 or (x2.shape[0], *x2.shape[2:]) != (N, H, W)):
        raise ValueError(f"{NAME}: x2 has shape {list(x2.shape)}, expected [N, C2, H, W] = [{N}, C2, {H}, {W}]")
    C += 0 if x2 is None else x2.shape[1]
    if groups < 1 or C % groups:
        raise ValueError(f"{NAME}: C={C} is not divisible by groups={groups}")
    if not eps > 0:
        raise ValueError(f"{NAME}: eps is {eps}, expected more than 0")
    for name, tensor in (("weight", weight), ("bias", bias)):
        require_shape(NAME, name, tensor, (C,), "[C]")
    for name, tensor in (("scale", scale), ("shift", shift)):
        require_shape(NAME, name, tensor, (N, C), "[N, C]")


def _empty(x, x2, groups):
    N, C = x.shape[0], x.shape[1] + (0 if x2 is None else x2.shape[1])
    dtype = torch.float64 if x.dtype is torch.float64 else torch.float32
    tables = (torch.empty(N, C, dtype=dtype, device=x.device) for _ in range(2))
    return *tables, torch.empty(N, groups, 2, dtype=torch.float64, device=x.device)


def _fake(x, weight, bias, groups, eps, x2, *others):
    return _empty(x, x2, groups)


def _autocast(dtype, *args):
    return args  # x keeps its dtype: every backend takes float32 parameters beside a 16-bit x


def _example(dtype, device):
    """The first residual block on the way up whose groups lie in both parts."""
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 640, 64, 64), 960, 960, (2, 320, 64, 64)
    x, weight, bias, x2 = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    x, x2 = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, x2))
    return _arguments(x, weight, bias, 32, x2=x2)


op = Op(
    NAME,
    "(Tensor x, Tensor? weight, Tensor? bias, int groups, float eps, Tensor? x2, Tensor? scale, Tensor? shift) "
    "-> (Tensor, Tensor, Tensor)",
    check=_check,
    fake=_fake,
    autocast=_autocast,
    normalise=_arguments,
    example=_example,
)
group_norm_affine.op = op


@op.backend("torch")
def _reference(x, weight, bias, groups, eps, x2, scale, shift):
    def wide(tensor):
        return tensor if x.dtype is torch.float64 else tensor.float()

    h = wide(x if x2 is None else torch.cat([x, x2], dim=1))
    N, C = h.shape[:2]
    if h.numel() == 0:
        zeros = h.sum((2, 3))  # keeps autograd's way back
        return zeros, zeros.clone(), zeros.new_zeros(N, groups, 2, dtype=torch.float64)
    variance, mean = torch.var_mean(h.reshape(N, groups, -1), dim=2, correction=0)  # [N, groups]
    moments = torch.stack([mean, variance], dim=2).double()
    mean, rstd = (s.repeat_interleave(C // groups, 1) for s in (mean, torch.rsqrt(variance + eps)))  # [N, C]
    factor = rstd if weight is None else rstd * wide(weight)
    offset = -mean * factor if bias is None else wide(bias) - mean * factor
    if scale is not None:
        factor, offset = factor * (1 + wide(scale)), offset * (1 + wide(scale))
    return factor, offset if shift is None else offset + wide(shift), moments


def _pixels(x, name):
    """x as [N, P, C] of unit stride in C: a copy only where its pixels have no common stride."""
    if x is None or x.shape[1] == 0:
        return {name: None, f"stride_{name}n": 0, f"stride_{name}p": 0}
    n, c, h, w = x.stride()
    if (c != 1 and x.shape[1] > 1) or (x.shape[2] > 1 and h != x.shape[3] * w):
        x = x.contiguous(memory_format=torch.channels_last)
    pixel = x.stride(3) if x.shape[3] > 1 else x.stride(2)
    return {name: x, f"stride_{name}n": x.stride(0), f"stride_{name}p": pixel}


def _native(extension, x, weight, bias, groups, eps, x2, scale, shift):
    norm_scale, norm_shift, moments = _empty(x, x2, groups)
    if x.shape[0] * norm_scale.shape[1] * x.shape[2:].numel() == 0:
        return norm_scale.zero_(), norm_shift.zero_(), moments.zero_()
    (weight, bias), param_dtype = in_one_dtype(x, weight, bias)
    (scale, shift), mod_dtype = in_one_dtype(x, scale, shift)
    fields = {
        **_pixels(x, "x1"),
        **_pixels(x2, "x2"),
        "weight": weight,
        "bias": bias,
        "scale": scale,
        "shift": shift,
        "stride_scale": 0 if scale is None else scale.stride(0),
        "stride_shift": 0 if shift is None else shift.stride(0),
        "norm_scale": norm_scale,
        "norm_shift": norm_shift,
        "moments": moments,
        "N": x.shape[0],
        "C1": x.shape[1],
        "C2": norm_scale.shape[1] - x.shape[1],
        "P": x.shape[2:].numel(),
        "groups": groups,
        "eps": eps,
        "dtype": native.DTYPES[x.dtype],
        "param_dtype": native.DTYPES[param_dtype],
        "mod_dtype": native.DTYPES[mod_dtype],
    }
    extension.group_norm_affine(fields, *native.place(x))
    return norm_scale, norm_shift, moments


native.register(op, _native, modules=("cpu",))
