"""The leaf layers over `ldmfast.ops`: each function does what a module's `forward` does, with what surrounds it.

Where no gradient is asked for, the norm of a product's input, its activation and its residual are folded into the
product: on a CPU (`folds`), and as far as one launch can take them in on a GPU (gpu/folding.py); else they are done in
turn. Activations are channels_last, so an image [N, C, H, W]
and its tokens [N, HW, C] are two views of the same memory.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import nn

from ldmfast import ops
from ldmfast.models.gpu.folding import folds_norm, folds_product, fuses
from ldmfast.models.guard import plain
from ldmfast.ops import native
from ldmfast.ops.dispatcher import laid_out, transformed, vmapped
from ldmfast.ops.gradients.products import SLOW
from ldmfast.ops.registry import chosen_backend

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_BUILT = native.missing("cpu") is None


def tokens(x: torch.Tensor) -> torch.Tensor:
    """[N, C, H, W] -> [N, HW, C]; a view if x is channels_last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def image(x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """[N, HW, C] -> [N, C, H, W], channels_last; a view."""
    return x.unflatten(1, size).permute(0, 3, 1, 2)


def channels_last(x: torch.Tensor) -> torch.Tensor:
    return laid_out(x, torch.channels_last)


def in_layout_of(like: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """x channels_last if `like` is that and no more, else contiguous: what a stock model returns."""
    if not vmapped() and like.is_contiguous(memory_format=torch.channels_last) and not like.is_contiguous():
        return x
    return x.contiguous()


def for_stock(x: torch.Tensor) -> torch.Tensor:
    """x [N, C, H, W] as it is given to a module that has, or is, a GroupNorm and is called: on a CPU contiguous.

    So the stock model has it there, and torch's GroupNorm of a channels_last image takes the variance as
    E[x^2] - E[x]^2: float32, mean 300, std 1, torch 2.13: 1.7e-2 off, of a contiguous one 1.9e-5.
    """
    return x.contiguous() if x.device.type == "cpu" else x


def from_stock(y: Any) -> Any:
    """What such a module returns, with the images in it laid out as ours are."""
    if isinstance(y, tuple):
        return tuple(map(from_stock, y))
    return channels_last(y) if isinstance(y, torch.Tensor) and y.ndim == 4 else y


def group_norm(
    m: nn.GroupNorm,
    x: torch.Tensor,
    *,
    silu: bool,
    add: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
) -> torch.Tensor:
    """act(GroupNorm(x + add) * (1 + scale) + shift); x [N, C, H, W]; add, scale and shift [N, C] or None."""
    if plain(m):
        return ops.group_norm_silu(
            x, m.weight, m.bias, m.num_groups, m.eps, silu=silu, add=add, scale=scale, shift=shift
        )
    x = from_stock(m(for_stock(x if add is None else x + add[:, :, None, None])))
    if scale is not None:
        x = x * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
    return F.silu(x) if silu else x


def dropout(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """m(x), x [N, C, H, W]; where m drops values, x lies as in a stock U-Net: random numbers fall as memory goes.

    So the same seed drops the same values. (In stock's UNet2DModel and autoencoders an attention's output is
    channels_last, and so is what comes after it: one that drops values goes through stock's forward.)
    """
    return m(x) if plain(m) else from_stock(m(x.contiguous()))


def drops(*layers: nn.Module | None) -> bool:
    """Whether a call of any of them draws what to drop, as a layer with a LoRA's lora_dropout does in training."""
    return any(
        isinstance(each, nn.modules.dropout._DropoutNd) and each.training and each.p > 0
        for m in layers
        if m is not None and type(m) not in (nn.Conv2d, nn.Linear)  # sooner said than plain(m)
        for each in m.modules()
    )


def _taken(x: torch.Tensor) -> bool:
    """Whether products of x go through our kernels, where they can: on a CPU, if no other backend was named.

    Under forward-mode AD and torch.func's transforms the layers are torch's, as in the stock model.
    """
    return (
        x.device.type == "cpu"
        and x.dtype in _DTYPES
        and chosen_backend() in (None, "cpu")
        and _BUILT
        and not transformed()
    )


def folds(x: torch.Tensor) -> bool:
    """Whether a product of x takes what surrounds it. The gradient of such a form would compute it twice, and under
    autocast the dtypes of what surrounds it are torch's affair."""
    return not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu") and _taken(x)


def kernel_takes(m: nn.Linear | nn.Conv2d, x: torch.Tensor) -> bool:
    """Whether our kernel computes m(x), surroundings apart.

    With gradients, a linear layer and a 1x1 convolution are torch's, where it multiplies the type: unfolded they gain
    nothing (a denoiser's step in float32, two Zen 4 cores, medians of 8 in turn: 0.392 s so, 0.425 s with ours).
    Under autocast it does where torch's loops would multiply the type: the op converts its operands as torch's does.
    """
    autocast = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if autocast else x.dtype
    if not plain(m) or not _taken(x) or (dtype not in SLOW if autocast else m.weight.dtype != dtype):
        return False
    is_linear = type(m) is nn.Linear
    if torch.is_grad_enabled() and dtype not in SLOW and (is_linear or m.kernel_size == (1, 1)):
        return False
    if is_linear:
        return True
    (k, _), (stride, _), (padding, _) = m.kernel_size, m.stride, m.padding
    square = (m.kernel_size, m.stride, m.padding) == ((k, k), (stride, stride), (padding, padding))
    return k in (1, 3) and square and m.groups == 1 and m.dilation == (1, 1) and m.padding_mode == "zeros"


def layer_norm(m: nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
    """x [..., C], normalised over C."""
    if folds(x) and folds_norm(m, x):
        return ops.layer_norm(x, m.weight, m.bias, m.eps)
    return m(x)


def linear(
    m: nn.Linear,
    x: torch.Tensor,
    *,
    norm: nn.LayerNorm | None = None,
    activation: str = "none",
    residual: torch.Tensor | None = None,
    output_scale: float = 1.0,
) -> torch.Tensor:
    """(activation(m(norm(x))) + residual) * output_scale; x [..., I] -> [..., O]. activation: none or geglu."""
    taken = kernel_takes(m, x)
    alone = norm is None and activation == "none" and residual is None and output_scale == 1.0
    if (taken and folds(x)) or (not alone and folds_product(m, x)):
        if norm is not None and not folds_norm(norm, x):
            x, norm = norm(x), None
        layer_norm = None if norm is None else (norm.weight, norm.bias, norm.eps)
        around = {"activation": activation, "residual": residual, "output_scale": output_scale}
        return ops.linear(x, m.weight, m.bias, layer_norm=layer_norm, **around)
    h = x if norm is None else norm(x)
    y = ops.linear(h, m.weight, m.bias) if taken else m(h)
    if activation == "geglu" and fuses(y, "geglu"):
        y = ops.geglu(y)
    elif activation == "geglu":
        a, b = y.chunk(2, dim=-1)
        y = a * F.gelu(b)
    return added(y, residual, output_scale)


def added(y: torch.Tensor, residual: torch.Tensor | None, output_scale: float) -> torch.Tensor:
    """(y + residual) * output_scale, a step at a time."""
    y = y if residual is None else y + residual
    return y if output_scale == 1.0 else y * output_scale


def conv2d(
    m: nn.Conv2d,
    x: torch.Tensor,
    *,
    skip: torch.Tensor | None = None,
    norm: nn.GroupNorm | None = None,
    table: tuple[torch.Tensor, torch.Tensor] | None = None,
    silu: bool = False,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    add: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    output_scale: float = 1.0,
    upsample: int = 1,
    biased: bool = True,
) -> torch.Tensor:
    """(m(up(silu(norm([x, skip]) * (1 + scale) + shift))) + add + residual) * output_scale.

    x, skip [N, C, H, W], the input's channels; scale, shift, add [N, C]; silu, scale and shift belong to the norm, in
    whose place table has it as ops.group_norm_affine leaves it; upsample 2: each pixel is repeated; biased False: what
    follows adds m's bias, which `lends_bias` says of m on a GPU.
    """
    taken = kernel_takes(m, x)
    if taken and folds(x) and (norm is None or plain(norm)):
        table = table if norm is None else _affine(norm, x, skip, scale, shift)
        named = {} if table is None else {"norm_scale": table[0], "norm_shift": table[1], "norm_silu": silu}
        around = {"x2": skip, "add": add, "residual": residual, "output_scale": output_scale, "upsample": upsample}
        return ops.conv2d(x, m.weight, m.bias, stride=m.stride[0], padding=m.padding[0], **named, **around)
    h = joined(x, skip)
    h = h if norm is None else group_norm(norm, h, silu=silu, scale=scale, shift=shift)
    if table is not None:
        h = (h * table[0][:, :, None, None] + table[1][:, :, None, None]).to(h.dtype)
        h = F.silu(h) if silu else h
    h = h if upsample == 1 else enlarged(h)
    around = residual is not None or output_scale != 1.0
    if around and add is None and folds_product(m, h) and _is_pixelwise(m):
        rows = None if residual is None else tokens(residual)
        y = ops.linear(tokens(h), m.weight.flatten(1), m.bias, residual=rows, output_scale=output_scale)
        return image(y, h.shape[2:])
    if around and lends_bias(m, h):
        y = _module(m, h, biased=False)
        return ops.bias_residual(y, m.bias, add=add, residual=residual, output_scale=output_scale)
    y = ops.conv2d(h, m.weight, m.bias, stride=m.stride[0], padding=m.padding[0]) if taken else _module(m, h, biased)
    y = y if add is None else y + add[:, :, None, None]
    return added(y, residual, output_scale)


def _affine(m, x, skip, scale, shift):
    return ops.group_norm_affine(x, m.weight, m.bias, m.num_groups, m.eps, x2=skip, scale=scale, shift=shift)[:2]


def joined(x: torch.Tensor, skip: torch.Tensor | None) -> torch.Tensor:
    """[x, skip] by channels."""
    return x if skip is None else torch.cat([x, skip], dim=1)


def enlarged(x: torch.Tensor, size: tuple[int, int] | None = None) -> torch.Tensor:
    """Each pixel of x [N, C, H, W] repeated: twice the size, or `size`."""
    if x.is_cuda and (x.shape[0] >= 64 or 4 * x.numel() >= 2**31):
        x = x.contiguous()  # torch's channels_last kernel counts in 32 bits (pytorch#141831, diffusers#984)
    return F.interpolate(x, size=size, scale_factor=2.0 if size is None else None, mode="nearest")


def lends_bias(m: nn.Conv2d, x: torch.Tensor) -> bool:
    """Whether m(x) leaves its bias to what follows: on a GPU PyTorch adds it in a kernel of its own."""
    return fuses(x, "bias_residual") and plain(m) and m.weight.dtype == x.dtype and not _is_pixelwise(m)


def _is_pixelwise(m: nn.Conv2d) -> bool:
    return m.kernel_size == m.stride == (1, 1) and m.padding == (0, 0) and m.groups == 1


def _module(m: nn.Conv2d, x: torch.Tensor, biased: bool = True) -> torch.Tensor:
    """m(x), without its bias where it is not to be biased; a 1x1 convolution as one product over the pixels.

    On a GPU the weight is laid out channels_last for good: the same Parameter and the same values. cuDNN's kernels for
    channels_last images take such a weight; another is laid out anew at every call.
    """
    if not plain(m):
        return from_stock(m(x.contiguous())) if drops(m) else m(x)  # see dropout
    if _is_pixelwise(m):
        return image(F.linear(tokens(x), m.weight.flatten(1), m.bias), x.shape[2:])
    if x.is_cuda and not torch.compiler.is_compiling() and not transformed():
        if not m.weight.is_contiguous(memory_format=torch.channels_last):
            m.weight.data = channels_last(m.weight.data)
    return m(x) if biased else F.conv2d(x, m.weight, None, m.stride, m.padding, m.dilation, m.groups)


def projected(m: nn.Module, x: torch.Tensor, norm: nn.GroupNorm, *, is_linear: bool) -> torch.Tensor:
    """A 1x1 convolution, or a linear layer over the pixels, of norm(x): [N, C, H, W] -> tokens [N, HW, O]."""
    if not is_linear:
        return tokens(conv2d(m, x, norm=norm))
    if kernel_takes(m, x) and folds(x) and plain(norm):
        norm_scale, norm_shift = _affine(norm, x, None, None, None)
        weight = m.weight[:, :, None, None]
        return tokens(ops.conv2d(x, weight, m.bias, norm_scale=norm_scale, norm_shift=norm_shift))
    h = group_norm(norm, x, silu=False)
    return linear(m, tokens(h.contiguous() if drops(m) else h))  # stock's tokens are a view of that


def activated_conv2d(m: nn.Conv2d, x: torch.Tensor, norm: nn.GroupNorm | None, activation: nn.Module) -> torch.Tensor:
    """m(activation(norm(x))), a network's last layers; m(x) without a norm."""
    if norm is None or (type(norm) is nn.GroupNorm and type(activation) is nn.SiLU and plain(activation)):
        return conv2d(m, x, norm=norm, silu=True)
    h = group_norm(norm, x, silu=False) if type(norm) is nn.GroupNorm else from_stock(norm(for_stock(x)))
    return conv2d(m, activation(h))


def timestep_embedding(
    proj: Timesteps, mlp: TimestepEmbedding, t: torch.Tensor, condition: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """t [N] -> [N, E]: sinusoid, linear, SiLU, linear in one op; in four where a condition joins the sinusoid."""
    if condition is None and plain(proj) and plain(mlp) and plain(mlp.linear_1) and plain(mlp.linear_2):
        first, second = mlp.linear_1, mlp.linear_2
        return ops.timestep_mlp(
            t,
            first.weight,
            first.bias,
            second.weight,
            second.bias,
            dim=proj.num_channels,
            flip_sin_to_cos=proj.flip_sin_to_cos,
            downscale_freq_shift=proj.downscale_freq_shift,
        )
    return mlp(proj(t).to(dtype), condition)
