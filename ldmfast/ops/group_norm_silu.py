"""SiLU(GroupNorm(x)), with what a U-Net puts before and after it, in one pass."""

from __future__ import annotations

import importlib

import torch
import torch.nn.functional as F

from ldmfast.ops import native, speeds, triton_backend
from ldmfast.ops.checks import require_device, require_dtype, require_float, require_shape
from ldmfast.ops.dispatcher import laid_out
from ldmfast.ops.operator import Op

NAME = "group_norm_silu"


def group_norm_silu(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    groups: int,
    eps: float = 1e-5,
    *,
    silu: bool = True,
    add: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """SiLU(GroupNorm(x + add) * (1 + scale) + shift) in one op.

    x             [N, C, ...]  float16 | bfloat16 | float32 (float64: the reference); contiguous or channels_last
    weight, bias  [C]          dtype of x, or float32; None: 1 and 0
    groups        channels are normalised in this many groups
    add           [N, C]       added to x before the statistics (the time embedding); dtype of x, or float32
    scale, shift  [N, C]       modulate after the affine; dtype of x, or float32
    silu          False leaves the activation out
    returns       [N, C, ...]  dtype and layout of x, dense; statistics are float32, two-pass or Welford

    Raises TypeError for what is no tensor; ValueError naming the argument for a wrong shape, dtype or device, for
    C % groups, or an unknown backend; NotImplementedError with the reason of each backend that refuses.
    Traffic: 2 * x bytes.   Source: Wu & He 2018, section 3.
    """
    return op(x, weight, bias, groups, eps, silu, add, scale, shift, backend)


def _arguments(x, weight, bias, groups, eps=1e-5, *, silu=True, add=None, scale=None, shift=None):
    return x, weight, bias, groups, eps, silu, add, scale, shift


def check(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
    add: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
) -> None:
    if x.dim() < 2:
        raise ValueError(f"{NAME}: x has shape {list(x.shape)}, expected [N, C, ...]")
    require_float(NAME, "x", x)
    N, C = x.shape[:2]
    if groups < 1 or C % groups:
        raise ValueError(f"{NAME}: C={C} is not divisible by groups={groups}")
    if not eps > 0:
        raise ValueError(f"{NAME}: eps is {eps}, expected more than 0")
    require_device(NAME, "x", x.device, weight=weight, bias=bias, add=add, scale=scale, shift=shift)
    require_dtype(NAME, (x.dtype, torch.float32), weight=weight, bias=bias, add=add, scale=scale, shift=shift)
    for name, tensor in (("weight", weight), ("bias", bias)):
        require_shape(NAME, name, tensor, (C,), "[C]")
    for name, tensor in (("add", add), ("scale", scale), ("shift", shift)):
        require_shape(NAME, name, tensor, (N, C), "[N, C]")


def empty_output(x: torch.Tensor) -> torch.Tensor:
    """Dense, in the layout of x: channels_last where x has its channels innermost, else contiguous."""
    return torch.empty_like(x, memory_format=memory_layout(x))


def memory_layout(x: torch.Tensor) -> torch.memory_format:
    # by strides, not is_contiguous: slices keep their layout too, and at H = W = 1 or C = 1 both layouts are the same
    if x.dim() == 4 and x.stride(1) == 1 and x.shape[1] > 1 and x.stride(3) != 1 and not x.is_contiguous():
        return torch.channels_last
    return torch.contiguous_format


def _fake(x, *others):
    return empty_output(x)


def _example(dtype, device):
    """The first level's, with the time embedding."""
    generator = torch.Generator().manual_seed(0)
    x, weight, bias, add = (
        torch.randn(shape, generator=generator).to(device, dtype) for shape in ((2, 320, 64, 64), 320, 320, (2, 320))
    )
    return _arguments(x.contiguous(memory_format=torch.channels_last), weight, bias, 32, add=add)


def _autocast(dtype, *args):
    return args  # x keeps its dtype: every backend takes float32 parameters beside a 16-bit x


op = Op(
    NAME,
    "(Tensor x, Tensor? weight, Tensor? bias, int groups, float eps, bool silu, Tensor? add, Tensor? scale, "
    "Tensor? shift) -> Tensor",
    check=check,
    fake=_fake,
    autocast=_autocast,
    normalise=_arguments,
    example=_example,
)
group_norm_silu.op = op


@op.backend("torch")
def _reference(x, weight, bias, groups, eps, silu, add, scale, shift):
    def cast(tensor):
        return None if tensor is None else tensor.to(x.dtype)

    def per_channel(tensor):  # [N, C] -> [N, C, 1, ...]
        return cast(tensor).reshape(*tensor.shape, *[1] * (x.dim() - 2))

    y = x if add is None else x + per_channel(add)
    # contiguous: torch's channels_last kernel takes E[x^2]-E[x]^2, off by 6.6e-3 at mean 300, std 1 (float32, CPU)
    y = F.group_norm(y.contiguous(), groups, cast(weight), cast(bias), eps)
    if scale is not None:
        y = y * (1 + per_channel(scale))
    if shift is not None:
        y = y + per_channel(shift)
    y = F.silu(y) if silu else y
    if y.numel() == 0:
        return empty_output(x).copy_(y)  # keeps autograd's way back
    return laid_out(y, memory_layout(x))


def _ncp_strides(x: torch.Tensor) -> tuple[int, int, int] | None:
    """The strides of x seen as [N, C, P], unit in C or in P; None where no view of x has such."""
    if x.dim() == 2:
        return x.stride(0), x.stride(1), 1
    last = pixels = 1  # of a side of 1 the stride says nothing, and contiguous() leaves any
    for size, stride in zip(reversed(x.shape[2:]), reversed(x.stride()[2:]), strict=True):
        if size > 1 and pixels == 1:
            last = stride
        elif size > 1 and stride != last * pixels:
            return None
        pixels *= size
    if last != 1 and pixels > 1 and memory_layout(x) is not torch.channels_last:
        return None
    return x.stride(0), x.stride(1), last if pixels > 1 else 1


def as_ncp(x: torch.Tensor) -> tuple[torch.Tensor, bool, tuple[int, int, int]]:
    """x as kernels take it (copied only if its pixels have no common stride), channels_last?, strides of [N, C, P]."""
    layout = memory_layout(x)
    strides = _ncp_strides(x)
    if strides is None:
        x = x.contiguous(memory_format=layout)
        strides = _ncp_strides(x)
    return x, layout is torch.channels_last, strides


def in_one_dtype(like: torch.Tensor, *tensors: torch.Tensor | None) -> tuple[list[torch.Tensor | None], torch.dtype]:
    """The tensors in one dtype (the first one's if they agree, else float32) with unit stride in C, and that dtype."""
    dtypes = {tensor.dtype for tensor in tensors if tensor is not None} or {like.dtype}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32

    def ready(tensor):
        if tensor is None:
            return None
        tensor = tensor.to(dtype)
        return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()

    return [ready(tensor) for tensor in tensors], dtype


def _native(extension, x, *others):
    y = empty_output(x)
    if y.numel():
        fields = native_fields(x, *others)
        fields["y"] = y
        extension.group_norm_silu(fields, *native.place(x))
    return y


def native_fields(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
    add: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
) -> dict:
    """GroupNormSiluArgs of csrc/ops.h but for y; the gradient's struct has these fields, too."""
    x, channels_last, (stride_xn, stride_xc, stride_xp) = as_ncp(x)
    (weight, bias), param_dtype = in_one_dtype(x, weight, bias)
    (add, scale, shift), mod_dtype = in_one_dtype(x, add, scale, shift)
    N, C = x.shape[:2]
    return {
        "x": x,
        "stride_xn": stride_xn,
        "stride_xc": stride_xc,
        "stride_xp": stride_xp,
        "weight": weight,
        "bias": bias,
        "add": add,
        "scale": scale,
        "shift": shift,
        "stride_add": 0 if add is None else add.stride(0),
        "stride_scale": 0 if scale is None else scale.stride(0),
        "stride_shift": 0 if shift is None else shift.stride(0),
        "N": N,
        "C": C,
        "P": x.numel() // (N * C),
        "groups": groups,
        "eps": eps,
        "silu": silu,
        "channels_last": channels_last,
        "dtype": native.DTYPES[x.dtype],
        "param_dtype": native.DTYPES[param_dtype],
        "mod_dtype": native.DTYPES[mod_dtype],
    }


native.register(op, _native)


def _triton(kernel, x, weight, bias, groups, eps, silu, add, scale, shift):
    y = empty_output(x)
    if y.numel():
        x, channels_last, strides = as_ncp(x)
        (weight, bias), _ = in_one_dtype(x, weight, bias)
        (add, scale, shift), _ = in_one_dtype(x, add, scale, shift)
        kernel(x, strides, channels_last, y, weight, bias, add, scale, shift, groups, eps, silu)
    return y


def too_wide(x: torch.Tensor, groups: int, kernels: str) -> str | None:
    """Triton's refusal for strides that a tile of this kernel file cannot reach with 32 bits."""
    if x.numel() == 0:
        return None
    module = importlib.import_module(f"ldmfast.kernels.{kernels}")
    N, C, P = *x.shape[:2], x.shape[2:].numel()
    _, stride_c, stride_p = _ncp_strides(x) or (0, 0, 0)  # of the copy, as of the output: at most C and P
    config = module.configuration(N, C, P, groups, memory_layout(x) is torch.channels_last)
    widest = max(config.block_c * max(stride_c, P), config.block_p * max(stride_p, C))
    return f"x of strides {x.stride()} reaches past 2^31 inside a tile" if widest >= 1 << 31 else None


triton_backend.register(op, _triton).refuses(lambda x, weight, bias, groups, *others: too_wide(x, groups, NAME))


def _sizes(x, *others):
    N, C = x.shape[:2]
    return {"N": N, "C": C, "P": x.shape[2:].numel(), "last": int(memory_layout(x) is torch.channels_last)}


speeds.register(op, _sizes)
