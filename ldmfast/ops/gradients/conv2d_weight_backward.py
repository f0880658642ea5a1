"""The gradient of a 3x3 convolution's weight where its stride is 1, on a CPU by Winograd's F(3x3, 2x2)."""

from __future__ import annotations

import torch

from ldmfast.ops import native, speeds
from ldmfast.ops.checks import require_device, require_dtype, require_float, require_shape, require_tensors
from ldmfast.ops.operator import Op

NAME = "conv2d_weight_backward"

# dy       [N, Co, Ho, Wo]   dtype of x, any layout (a copy is made of one that is not channels_last)
# x        [N, Ci, H, W]     likewise; Ho = H + 2 * padding - 2, Wo likewise
# returns  [Co, Ci, 3, 3]    dtype of x, contiguous
#
# Work: 2 * N * Ho * Wo * Co * Ci * 9 operations, of which the kernel makes 4 in 9.


def _check(dy, x, padding):
    require_tensors(NAME, dy=dy, x=x)
    if x.dim() != 4 or dy.dim() != 4:
        raise ValueError(f"{NAME}: x and dy have {x.dim()} and {dy.dim()} dimensions, expected 4 of each")
    require_float(NAME, "x", x)
    require_dtype(NAME, (x.dtype,), dy=dy)
    require_device(NAME, "x", x.device, dy=dy)
    N, _, H, W = x.shape
    out = N, dy.shape[1], H + 2 * padding - 2, W + 2 * padding - 2
    require_shape(NAME, "dy", dy, out, "[N, Co, H + 2 * padding - 2, W + 2 * padding - 2]")


def _empty(dy, x):
    return torch.empty(dy.shape[1], x.shape[1], 3, 3, dtype=x.dtype, device=x.device)


op = Op(
    NAME,
    "(Tensor dy, Tensor x, int padding) -> Tensor",
    check=_check,
    fake=lambda dy, x, padding: _empty(dy, x),
    autocast=lambda dtype, *args: args,
)


@op.backend("torch")
def _reference(dy, x, padding):
    others = [1, 1], [padding] * 2, [1, 1], False, [0, 0], 1, [False, True, False]
    return torch.ops.aten.convolution_backward(dy, x, _empty(dy, x), None, *others)[1].contiguous()


def _native(extension, dy, x, padding):
    dw = _empty(dy, x)
    if 0 in (dw.numel(), dy.numel()):
        return dw.zero_()
    fields = {"dw": dw, "padding": padding}
    for name, tensor in (("dy", dy), ("x", x)):
        if tensor.stride(1) != 1:
            tensor = tensor.contiguous(memory_format=torch.channels_last)
        n, _, h, w = tensor.stride()
        fields |= {name: tensor, f"stride_{name}n": n, f"stride_{name}h": h, f"stride_{name}w": w}
    fields |= dict(zip(("N", "Ci", "H", "W"), x.shape, strict=True))
    fields |= dict(zip(("Co", "Ho", "Wo"), dy.shape[1:], strict=True))
    extension.conv2d_weight_backward(fields, *native.place(x))
    return dw


native.register(op, _native, lead=1, modules=("cpu",))


@op.backends["cpu"].refuses
def _refusal(dy, x, padding):
    return None if x.dtype is torch.float32 else f"{x.dtype} is not compiled; float32 is"


speeds.register(
    op,
    lambda dy, x, padding: {
        "Ci": x.shape[1],
        "Co": dy.shape[1],
        "pixels": dy[:, 0].numel(),
        "lanes": native.lanes() if native.missing("cpu") is None else 0,
    },
    lead=1,
)


def runs(dy: torch.Tensor, x: torch.Tensor, padding: int) -> bool:
    """Whether the kernel takes these tensors and is the fastest that does."""
    return op.best((dy, x, padding)).name == "cpu"
