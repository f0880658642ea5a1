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


def tokens(x: torch.Tensor) -> torch.Tensor:
    """[N, C, H, W] -> [N, HW, C]; a view if x is channels_last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def image(x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """[N, HW, C] -> [N, C, H, W], channels_last; a view."""
    return x.unflatten(1, size).permute(0, 3, 1, 2)


def channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def weights_channels_last(model: nn.Module) -> None:
    """Lay every convolution's weight out channels_last, in place: the same Parameter and the same values.

    Kernels for channels_last images re-order a contiguous weight at every call; for the 1280-channel convolutions
    that costs more than the convolution (2560 -> 1280 at 8x8, bfloat16: 55 ms against 32 ms on two Zen 4 cores).
    """
    for module in model.modules():
        if plain(module) and isinstance(module, nn.Conv2d) and not module.weight.is_meta:
            module.weight.data = channels_last(module.weight.data)


def group_norm(m: nn.GroupNorm, x: torch.Tensor, *, silu: bool, add=None, scale=None, shift=None) -> torch.Tensor:
    """act(GroupNorm(x + add) * (1 + scale) + shift); x [N, C, H, W]; add, scale and shift [N, C] or None."""
    if plain(m):
        return ops.group_norm_silu(
            x, m.weight, m.bias, m.num_groups, m.eps, silu=silu, add=add, scale=scale, shift=shift
        )
    x = m(x if add is None else x + add[:, :, None, None])
    if scale is not None:
        x = x * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
    return F.silu(x) if silu else x


def conv2d(m: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    return m(x)


def pointwise(m: nn.Conv2d, x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """A 1x1 convolution on tokens: [N, HW, C] -> [N, HW, O]."""
    if plain(m) and m.kernel_size == m.stride == (1, 1) and m.padding == (0, 0) and m.groups == 1:
        return F.linear(x, m.weight.flatten(1), m.bias)
    return tokens(m(image(x, size)))


def timestep_embedding(proj: Timesteps, mlp: TimestepEmbedding, t: torch.Tensor, condition, dtype) -> torch.Tensor:
    """t [N] -> [N, E]: sinusoid, linear, SiLU, linear in one op; in four where a condition joins the sinusoid."""
    first, second = mlp.linear_1, mlp.linear_2
    if condition is None and all(map(plain, (proj, mlp, first, second))):
        return ops.timestep_mlp(
            t, first.weight, first.bias, second.weight, second.bias, dim=proj.num_channels,
            flip_sin_to_cos=proj.flip_sin_to_cos, downscale_freq_shift=proj.downscale_freq_shift,
        )  # fmt: skip
    return mlp(proj(t).to(dtype), condition)
