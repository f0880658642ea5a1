"""The leaf layers: each function does what one plain module's `forward` does, over `ldmfast.ops`.

Activations are channels_last, so an image [N, C, H, W] and its tokens [N, HW, C] are two views of the same memory.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import nn

from ldmfast import ops
from ldmfast.models.guard import plain

# 16-bit types that oneDNN does not multiply on this processor. torch's own loops then do, many times slower than
# float32 products: one thread of Zen 3 (AVX2), 320 -> 320 at 32x32 twice, 365 ms in bfloat16 and 43 ms in float32;
# a linear layer 320 -> 2560 of 2048 tokens 393 and 51 ms.
SLOW = tuple(
    dtype
    for dtype, native in (
        (torch.bfloat16, torch.ops.mkldnn._is_mkldnn_bf16_supported()),
        (torch.float16, torch.ops.mkldnn._is_mkldnn_fp16_supported()),
    )
    if not native
)


def tokens(x: torch.Tensor) -> torch.Tensor:
    """[N, C, H, W] -> [N, HW, C]; a view if x is channels_last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def image(x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """[N, HW, C] -> [N, C, H, W], channels_last; a view."""
    return x.unflatten(1, size).permute(0, 3, 1, 2)


def channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def in_layout_of(like: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """x channels_last if `like` is that and no more, else contiguous: what a stock model returns."""
    if like.is_contiguous(memory_format=torch.channels_last) and not like.is_contiguous():
        return x
    return x.contiguous()


def weights_channels_last(model: nn.Module) -> None:
    """Lay every convolution's weight out channels_last, in place: the same Parameter and the same values.

    Kernels for channels_last images re-order a contiguous weight at every call; for the 1280-channel convolutions
    that costs more than the convolution (2560 -> 1280 at 8x8, bfloat16: 55 ms against 32 ms on two Zen 4 cores).
    """
    for module in model.modules():
        if plain(module) and isinstance(module, nn.Conv2d) and not module.weight.is_meta:
            module.weight.data = channels_last(module.weight.data)


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
    x = m(x if add is None else x + add[:, :, None, None])
    if scale is not None:
        x = x * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
    return F.silu(x) if silu else x


def linear(m: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """x [..., I] -> [..., O]; the product in float32 where the processor is slow at x's type."""
    if _slow(m, x):
        return F.linear(*_in_float32(x, m.weight, m.bias)).to(x.dtype)
    return m(x)


def conv2d(m: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """A convolution on [N, C, H, W]; a small image under a 3x3 kernel as one matrix product over its patches. In
    float32 where the processor is slow at x's type."""
    dtype, slow, few = x.dtype, _slow(m, x), _few_pixels(m, x)
    if not slow and not few:
        return m(x)
    x, weight, bias = _in_float32(x, m.weight, m.bias) if slow else (x, m.weight, m.bias)
    if not few:
        return m._conv_forward(x, weight, bias).to(dtype)
    n, _, h, w = x.shape
    y = F.linear(_patches(x), weight.permute(0, 2, 3, 1).flatten(1), bias).to(dtype)
    return y.view(n, h, w, m.out_channels).permute(0, 3, 1, 2)


def _slow(m: nn.Module, x: torch.Tensor) -> bool:
    """Whether the layer's product is to be made in float32: exact products and sums, rounded once, as ever."""
    return (
        x.dtype in SLOW
        and x.device.type == "cpu"
        and isinstance(m, nn.Linear | nn.Conv2d)
        and m.weight.dtype == x.dtype
        and not torch.is_autocast_enabled("cpu")
        and plain(m)
    )


def _in_float32(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple:
    return x.float(), weight.float(), None if bias is None else bias.float()


def _few_pixels(m: nn.Conv2d, x: torch.Tensor) -> bool:
    """Whether oneDNN's convolution would spend its time re-ordering the weight, which its matrix product does not.

    One thread of Zen 4, 2560 -> 1280 at 8x8: 54 -> 21 ms in bfloat16, 103 -> 54 ms in float32; at 16x16 100 -> 75 and
    239 -> 163 ms; at 32x32 the convolution wins. Nothing is kept, so nothing can go stale.
    """
    return (
        x.device.type == "cpu"
        and not torch.is_grad_enabled()
        and x.numel() <= 256 * x.shape[1]
        and plain(m)
        and (m.kernel_size, m.stride, m.padding, m.dilation, m.groups) == ((3, 3), (1, 1), (1, 1), (1, 1), 1)
        and m.padding_mode == "zeros"
        and m.weight.is_contiguous(memory_format=torch.channels_last)
        and not torch.compiler.is_compiling()
    )


def _patches(x: torch.Tensor) -> torch.Tensor:
    """[N, C, H, W] -> [N H W, 9 C]: each pixel's 3x3 neighbourhood, in the order of a channels_last weight."""
    n, c, h, w = x.shape
    padded = x.new_zeros(n, h + 2, w + 2, c)
    padded[:, 1:-1, 1:-1] = x.permute(0, 2, 3, 1)
    by_n, by_h, by_w, by_c = padded.stride()
    return padded.as_strided((n, h, w, 3, 3, c), (by_n, by_h, by_w, by_h, by_w, by_c)).reshape(n * h * w, 9 * c)


def pointwise(m: nn.Conv2d, x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """A 1x1 convolution on tokens: [N, HW, C] -> [N, HW, O]."""
    if plain(m) and m.kernel_size == m.stride == (1, 1) and m.padding == (0, 0) and m.groups == 1:
        if _slow(m, x):
            x32, weight, bias = _in_float32(x, m.weight.flatten(1), m.bias)
            return F.linear(x32, weight, bias).to(x.dtype)
        return F.linear(x, m.weight.flatten(1), m.bias)
    return tokens(m(image(x, size)))


def timestep_embedding(
    proj: Timesteps, mlp: TimestepEmbedding, t: torch.Tensor, condition: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """t [N] -> [N, E]: sinusoid, linear, SiLU, linear in one op; in four where a condition joins the sinusoid."""
    first, second = mlp.linear_1, mlp.linear_2
    if condition is None and all(map(plain, (proj, mlp, first, second))):
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
