"""What follows a convolution that another library computes: bias, time embedding, residual and scale in one pass."""

from __future__ import annotations

import torch

from ldmfast.ops import native, triton_backend
from ldmfast.ops.checks import require_device, require_dtype, require_float, require_shape
from ldmfast.ops.dispatcher import laid_out
from ldmfast.ops.group_norm_silu import empty_output, memory_layout
from ldmfast.ops.operator import Op

NAME = "bias_residual"


def bias_residual(
    x: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    add: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    output_scale: float = 1.0,
    backend: str | None = None,
) -> torch.Tensor:
    """(x + bias + add + residual) * output_scale.

    x             [N, C, ...]  float16 | bfloat16 | float32 (float64: the reference); contiguous or channels_last
    bias          [C]          dtype of x, or None
    add           [N, C]       added to every pixel of a channel; dtype of x, or None
    residual      [N, C, ...]  dtype of x, or None; read without a copy where it has the layout of x
    output_scale  a factor for the whole result
    returns       [N, C, ...]  dtype and layout of x, dense; sums are float32

    Raises TypeError for what is no tensor; ValueError naming the argument for a wrong shape, dtype or device, or an
    unknown backend; NotImplementedError with the reason of each backend that refuses.
    Traffic: 3 * x bytes with a residual, else 2.   Source: He et al. 2015.
    """
    return op(*_arguments(x, bias, add=add, residual=residual, output_scale=output_scale), backend)


def _arguments(x, bias=None, *, add=None, residual=None, output_scale=1.0):
    return x, bias, add, residual, float(output_scale)


def _check(x, bias, add, residual, output_scale):
    if x.dim() < 2:
        raise ValueError(f"{NAME}: x has shape {list(x.shape)}, expected [N, C, ...]")
    require_float(NAME, "x", x)
    require_device(NAME, "x", x.device, bias=bias, add=add, residual=residual)
    require_dtype(NAME, (x.dtype,), bias=bias, add=add, residual=residual)
    require_shape(NAME, "bias", bias, tuple(x.shape[1:2]), "[C]")
    require_shape(NAME, "add", add, tuple(x.shape[:2]), "[N, C]")
    require_shape(NAME, "residual", residual, tuple(x.shape), "x's shape")


def _fake(x, *others):
    return empty_output(x)


def _autocast(dtype, *args):
    x, bias, add, residual, output_scale = args
    return x, *(None if tensor is None else tensor.to(x.dtype) for tensor in (bias, add, residual)), output_scale


def _example(dtype, device):
    """The end of the first level's residual blocks."""
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 320, 64, 64), 320, (2, 320, 64, 64)
    x, bias, residual = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    x, residual = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, residual))
    return _arguments(x, bias, residual=residual)


op = Op(
    NAME,
    "(Tensor x, Tensor? bias, Tensor? add, Tensor? residual, float output_scale) -> Tensor",
    check=_check,
    fake=_fake,
    autocast=_autocast,
    normalise=_arguments,
    example=_example,
)
bias_residual.op = op


@op.backend("torch")
def _reference(x, bias, add, residual, output_scale):
    def per_channel(tensor):  # [C] or [N, C] -> [1 or N, C, 1, ...]
        return tensor.reshape(-1, x.shape[1], *[1] * (x.dim() - 2))

    y = x
    for tensor in (bias, add):
        y = y if tensor is None else y + per_channel(tensor)
    y = y if residual is None else y + residual
    y = y * output_scale  # also where that is 1: the result is never x itself
    return laid_out(y, memory_layout(x))


def _inputs(x, bias, add, residual):
    """(x and residual dense in the layout of x, bias dense, add of unit stride in C; channels_last?)"""
    layout = memory_layout(x)
    x, residual = (None if tensor is None else tensor.contiguous(memory_format=layout) for tensor in (x, residual))
    bias = None if bias is None else bias.contiguous()
    add = add if add is None or add.stride(1) == 1 or add.shape[1] == 1 else add.contiguous()
    return x, bias, add, residual, layout is torch.channels_last


def _native(extension, x, bias, add, residual, output_scale):
    y = empty_output(x)
    if y.numel() == 0:
        return y
    x, bias, add, residual, last = _inputs(x, bias, add, residual)
    fields = {
        "x": x,
        "bias": bias,
        "add": add,
        "stride_add": 0 if add is None else add.stride(0),
        "residual": residual,
        "y": y,
        "N": x.shape[0],
        "C": x.shape[1],
        "P": x.shape[2:].numel(),
        "output_scale": output_scale,
        "channels_last": last,
        "dtype": native.DTYPES[x.dtype],
    }
    extension.bias_residual(fields, *native.place(x))
    return y


native.register(op, _native, modules=("cuda", "cuda-host"))


def _triton(kernel, x, bias, add, residual, output_scale):
    y = empty_output(x)
    if y.numel():
        kernel(*_inputs(x, bias, add, residual), y, output_scale)
    return y


triton_backend.register(op, _triton)
