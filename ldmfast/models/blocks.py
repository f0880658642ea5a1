"""The U-Net's blocks as plain functions over diffusers' modules, which only hold the parameters.

Each function does what its module's `forward` does. Where the guard finds an obstacle (guard.py), the module itself
is called, so anything that was attached to it still works; the rest of the network stays with us.
Images are [N, C, H, W] in channels_last, tokens [N, HW, C].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_blocks import AttnDownBlock2D, AttnUpBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn

from ldmfast import ops
from ldmfast.models.gpu.folding import folds_norm, fuses, products_fold, side_by_side
from ldmfast.models.guard import obstacle
from ldmfast.models.layers import (
    added,
    conv2d,
    dropout,
    drops,
    enlarged,
    folds,
    for_stock,
    from_stock,
    group_norm,
    image,
    joined,
    layer_norm,
    lends_bias,
    linear,
    projected,
    tokens,
)
from ldmfast.ops.measured.ranges import block as named
from ldmfast.ops.planning.memory import give_back_freed

# bytes of a picture, from which on freed memory is given back before it: some milliseconds
LARGE = 16 << 20


@dataclass
class BlockInputs:
    """What every block takes beside the picture: the time, the prompt, and which keys to attend to."""

    temb: torch.Tensor | None = None  # [N, E]
    temb_silu: torch.Tensor | None = None  # SiLU(temb), which every resnet's projection takes
    context: torch.Tensor | tuple | None = None  # [N, S, C]; a tuple with image prompts (IP-Adapter)
    self_mask: torch.Tensor | None = None  # [N, 1, L] additive
    context_mask: torch.Tensor | None = None  # [N, 1, S] additive

    def for_attention(self) -> dict:
        """The keyword arguments of a stock block with cross-attention."""
        return {
            "encoder_hidden_states": self.context,
            "attention_mask": self.self_mask,
            "encoder_attention_mask": self.context_mask,
        }


def recomputed(
    m: nn.Module,
    function: Callable[..., torch.Tensor],
    layer: nn.Module,
    x: torch.Tensor,
    cond: BlockInputs,
    *more: Any,
) -> torch.Tensor:
    """function(layer, x, cond, *more); while gradient checkpointing is on in `m`, it runs again in the backward pass.

    Each tensor is an argument of its own: a reentrant checkpoint looks for gradients in nothing else.
    """
    if not (m.gradient_checkpointing and torch.is_grad_enabled()):
        return function(layer, x, cond, *more)
    given = tuple(vars(cond).values())

    def again(x, *rest):
        return function(layer, x, BlockInputs(*rest[: len(given)]), *rest[len(given) :])

    return m._gradient_checkpointing_func(again, x, *given, *more)


@named
def resnet(
    m: ResnetBlock2D,
    x: torch.Tensor,
    cond: BlockInputs,
    size: tuple[int, int] | None = None,
    skip: torch.Tensor | None = None,
) -> torch.Tensor:
    """GroupNorm, SiLU, conv; time; GroupNorm, SiLU, conv; plus the input, which is [x, skip] by channels.

    One that resamples does so to both, first. One whose layers drop values of their inputs is stock's: they do so in
    the order of its calls, which is another here.
    """
    if obstacle(m):
        return from_stock(m(for_stock(joined(x, skip)), cond.temb))
    if drops(m.conv1, m.time_emb_proj, m.conv2, m.conv_shortcut):
        return from_stock(m(joined(x, skip).contiguous(), cond.temb))
    if not folds(x):
        x, skip = joined(x, skip), None
    lent = m.conv1.bias if lends_bias(m.conv1, x) else None
    time = _time(m, cond, x.shape[0], lent)
    if m.upsample is not None or m.downsample is not None:
        x, h = _resampled(m, joined(x, skip), size)
        skip = None
        h = conv2d(m.conv1, h, biased=lent is None)
    else:
        # folded, the time joins the first convolution's output; else the second norm's input
        add = time.pop("add", None) if folds(x) else None
        h = conv2d(m.conv1, x, skip=skip, norm=m.norm1, silu=True, add=add, biased=lent is None)
    x = joined(x, skip) if m.conv_shortcut is None else conv2d(m.conv_shortcut, x, skip=skip)
    around = {"residual": x, "output_scale": 1 / m.output_scale_factor}
    if "add" in time or obstacle(m.dropout):
        h = dropout(m.dropout, group_norm(m.norm2, h, silu=True, **time))
        return conv2d(m.conv2, h, **around)
    return conv2d(m.conv2, h, norm=m.norm2, silu=True, **time, **around)


def _resampled(m: ResnetBlock2D, x: torch.Tensor, size: tuple[int, int] | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(x, SiLU(GroupNorm(x))), both at the next level's size"""
    h = group_norm(m.norm1, x, silu=True)
    if m.upsample is not None:
        return upsample(m.upsample, x, size), upsample(m.upsample, h, size)
    return downsample(m.downsample, x), downsample(m.downsample, h)


def _time(m: ResnetBlock2D, cond: BlockInputs, batch: int, lent: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """How the time embedding enters the second norm: added before it, or as scale and shift after it.

    lent [C]: the first convolution's bias, if it is to be added here
    """
    rows = None if lent is None else lent.expand(batch, -1)
    lent_only = {} if rows is None else {"add": rows}
    if m.time_emb_proj is None or cond.temb is None:
        return lent_only
    temb = cond.temb if m.skip_time_act else cond.temb_silu
    if m.time_embedding_norm == "default":
        return {"add": linear(m.time_emb_proj, temb, residual=rows)}
    scale, shift = linear(m.time_emb_proj, temb).chunk(2, dim=1)
    return {"scale": scale, "shift": shift, **lent_only}


@named
def attention(
    m: Attention, x: torch.Tensor, context: torch.Tensor | None, mask: torch.Tensor | None, norm: nn.LayerNorm
) -> torch.Tensor:
    """x + softmax(q k^T / sqrt(D) + mask) v, q from norm(x) [N, L, C], k and v from context [N, S, C'] or norm(x).

    mask [N, 1, S] additive
    """
    if obstacle(m) or m.group_norm is not None:
        return x + m(norm(x), encoder_hidden_states=context, attention_mask=mask)
    mask = None if mask is None else mask[:, None]
    if products_fold(x) and not m.residual_connection:  # each product begins with the norm, where it is not shared
        return _attended(m, _attend(m, x, x if context is None else context, mask, norm), None, x)
    h = layer_norm(norm, x)
    y = _attend(m, h, h if context is None else context, mask)
    return _attended(m, y, h if m.residual_connection else None, x)


@named
def image_attention(m: Attention, x: torch.Tensor, cond: BlockInputs) -> torch.Tensor:
    """Self-attention over the pixels of x [N, C, H, W] behind its own GroupNorm: the autoencoder's and UNet2D's."""
    if obstacle(m) or m.group_norm is None:
        return from_stock(m(for_stock(x), temb=cond.temb))
    h = tokens(group_norm(m.group_norm, x, silu=False))  # [N, HW, C]
    return image(_attended(m, _attend(m, h, h), tokens(x) if m.residual_connection else None, None), x.shape[2:])


def _attend(
    m: Attention,
    x: torch.Tensor,
    keys: torch.Tensor,
    mask: torch.Tensor | None = None,
    norm: nn.LayerNorm | None = None,
) -> torch.Tensor:
    """Project and attend: x [N, L, C], keys [N, S, C'] -> [N, L, H D]. Heads are views; nothing is transposed.

    norm: of x, still to be done; where keys are x, of both
    """
    q, k, v = _projected(m, x, keys, norm)  # [N, L, H D], [N, S, H D] twice
    q, k, v = (t.unflatten(-1, (m.heads, -1)) for t in (q, k, v))  # [N, L, H, D], [N, S, H, D] twice
    return ops.attention(q, k, v, mask=mask).flatten(2)


def _projected(m: Attention, x: torch.Tensor, keys: torch.Tensor, norm: nn.LayerNorm | None) -> tuple:
    """Queries of x, keys and values of keys: all three in one product, or the last two, where that can be."""
    if products_fold(x):
        if keys is x:
            if together := side_by_side(x, (m.to_q, m.to_k, m.to_v), norm):
                return together
        elif pair := side_by_side(keys, (m.to_k, m.to_v)):
            return linear(m.to_q, x, norm=norm), *pair
    if norm is not None:
        h = layer_norm(norm, x)
        x, keys = h, h if keys is x else keys
    return linear(m.to_q, x), linear(m.to_k, keys), linear(m.to_v, keys)


def _attended(m: Attention, h: torch.Tensor, inner: torch.Tensor | None, outer: torch.Tensor | None) -> torch.Tensor:
    """(m.to_out(h) + inner) / rescale_output_factor + outer: inner the module's own residual, outer the block's."""
    scale = 1 / m.rescale_output_factor
    if obstacle(m.to_out[1]):
        h = m.to_out[1](linear(m.to_out[0], h))
        return added(added(h, inner, scale), outer, 1.0)
    if outer is None or (inner is None and scale == 1):
        return linear(m.to_out[0], h, residual=inner if outer is None else outer, output_scale=scale)
    return linear(m.to_out[0], h, residual=inner, output_scale=scale) + outer


@named
def feed_forward(m: FeedForward, x: torch.Tensor, norm: nn.LayerNorm, h: torch.Tensor | None = None) -> torch.Tensor:
    """x + GEGLU and a linear layer of h = norm(x), where that is there already: x + (a * gelu(b)) W, [a, b] = h V."""
    if obstacle(m) or type(m.net[0]) is not GEGLU or obstacle(m.net[0]):
        return x + m(norm(x) if h is None else h)
    proj = m.net[0].proj
    h = linear(proj, x, norm=norm, activation="geglu") if h is None else linear(proj, h, activation="geglu")
    if len(m.net) == 3 and not obstacle(m.net[1]):  # dropout, linear; h [N, L, 4C]
        return linear(m.net[2], h, residual=x)
    for layer in m.net[1:]:
        h = linear(layer, h) if isinstance(layer, nn.Linear) else layer(h)
    return x + h


@named
def transformer_block(m: BasicTransformerBlock, x: torch.Tensor, cond: BlockInputs) -> torch.Tensor:
    """Self-attention, cross-attention and feed-forward, each behind a LayerNorm and added to x [N, L, C]."""
    if obstacle(m):
        return m(x, **cond.for_attention())
    if _sums_meet_norms(m, x):
        return _transformer_block_of_sums(m, x, cond)
    x = attention(m.attn1, x, cond.context if m.only_cross_attention else None, cond.self_mask, m.norm1)
    if m.attn2 is not None:
        x = attention(m.attn2, x, cond.context, cond.context_mask, m.norm2)
    return feed_forward(m.ff, x, m.norm3)


def _sums_meet_norms(m: BasicTransformerBlock, x: torch.Tensor) -> bool:
    """Whether each residual sum and the LayerNorm that reads it are one launch: a GPU's, where products do not fold."""
    if m.attn2 is None or products_fold(x) or not fuses(x, "residual_layer_norm"):
        return False
    return all(folds_norm(norm, x) for norm in (m.norm2, m.norm3)) and not any(
        obstacle(attn) or attn.group_norm or attn.residual_connection or attn.rescale_output_factor != 1
        or obstacle(attn.to_out[1])
        for attn in (m.attn1, m.attn2)
    )  # fmt: skip


def _transformer_block_of_sums(m: BasicTransformerBlock, x: torch.Tensor, cond: BlockInputs) -> torch.Tensor:
    def attended(attn, h, context, mask):
        mask = None if mask is None else mask[:, None]
        return linear(attn.to_out[0], _attend(attn, h, h if context is None else context, mask))

    def summed(y, x, norm):
        return ops.residual_layer_norm(y, x, norm.weight, norm.bias, norm.eps)

    context = cond.context if m.only_cross_attention else None
    y = attended(m.attn1, layer_norm(m.norm1, x), context, cond.self_mask)
    x, h = summed(y, x, m.norm2)
    x, h = summed(attended(m.attn2, h, cond.context, cond.context_mask), x, m.norm3)
    return feed_forward(m.ff, x, m.norm3, h)


@named
def transformer(m: Transformer2DModel, x: torch.Tensor, cond: BlockInputs) -> torch.Tensor:
    """The spatial transformer: an image as tokens, through its blocks, and added back."""
    if obstacle(m):
        return from_stock(m(for_stock(x), **cond.for_attention(), return_dict=False)[0])
    size = x.shape[2:]
    h = projected(m.proj_in, x, m.norm, is_linear=m.use_linear_projection)  # [N, HW, C]
    for block in m.transformer_blocks:
        h = recomputed(m, transformer_block, block, h, cond)
    if m.use_linear_projection:
        return image(linear(m.proj_out, h, residual=tokens(x)), size)
    return conv2d(m.proj_out, image(h, size), residual=x)


def resample(m: nn.Module, x: torch.Tensor, cond: BlockInputs, size: tuple[int, int] | None = None) -> torch.Tensor:
    """The step to the next level: a resnet that resamples, or a convolution that does."""
    if isinstance(m, ResnetBlock2D):
        return resnet(m, x, cond, size)
    return upsample(m, x, size) if isinstance(m, Upsample2D) else downsample(m, x)


@named
def downsample(m: Downsample2D, x: torch.Tensor) -> torch.Tensor:
    """Half the size: a convolution of stride 2 (padded only right and below where `padding` is 0), or a mean."""
    if obstacle(m):
        return m(x)
    if m.use_conv and m.padding == 0:
        x = F.pad(x, (0, 1, 0, 1))
    return conv2d(m.conv, x)


@named
def upsample(m: Upsample2D, x: torch.Tensor, size: tuple[int, int] | None = None) -> torch.Tensor:
    """Twice the size, or `size`: each pixel repeated, then a convolution."""
    if obstacle(m):
        return m(x, size)
    twice = size is None or tuple(size) == (2 * x.shape[2], 2 * x.shape[3])
    if m.interpolate and m.use_conv and twice:
        return conv2d(m.conv, x, upsample=2)
    x = enlarged(x, size) if m.interpolate else x
    return conv2d(m.conv, x) if m.use_conv else x


@named
def down_block(
    m: nn.Module, x: torch.Tensor, cond: BlockInputs, residual: torch.Tensor | None = None
) -> tuple[torch.Tensor, tuple]:
    """(x, the skips) of one level on the way down. `residual` (T2I-Adapter) joins before the downsampler."""
    crosses = has_cross_attention(m)
    if obstacle(m):
        if not crosses:
            return from_stock(m(hidden_states=for_stock(x), temb=cond.temb))
        extra = {} if residual is None else {"additional_residuals": residual}
        return from_stock(m(hidden_states=for_stock(x), temb=cond.temb, **cond.for_attention(), **extra))
    skips = []
    give_back_before(x)
    for i, layer in enumerate(m.resnets):
        x = recomputed(m, resnet, layer, x, cond)
        if crosses:
            x = transformer(m.attentions[i], x, cond)  # recomputes each of its blocks
            if residual is not None and i == len(m.resnets) - 1:
                x = x + residual
        elif type(m) is AttnDownBlock2D:
            x = recomputed(m, image_attention, m.attentions[i], x, cond)
        skips.append(x)
    for layer in m.downsamplers or ():
        x = resample(layer, x, cond)
    if m.downsamplers is not None:
        skips.append(x)
    return x, tuple(skips)


@named
def mid_block(m: nn.Module, x: torch.Tensor, cond: BlockInputs) -> torch.Tensor:
    """The lowest level: resnet, then (transformer, resnet) each time."""
    crosses = has_cross_attention(m)
    if obstacle(m):
        return from_stock(m(for_stock(x), cond.temb, **(cond.for_attention() if crosses else {})))
    x = recomputed(m, resnet, m.resnets[0], x, cond)
    for attn, layer in zip(m.attentions, m.resnets[1:], strict=True):
        if attn is not None:
            x = transformer(attn, x, cond) if crosses else image_attention(attn, x, cond)
        x = recomputed(m, resnet, layer, x, cond)
    return x


@named
def up_block(
    m: nn.Module, x: torch.Tensor, skips: tuple, cond: BlockInputs, size: tuple[int, int] | None = None
) -> torch.Tensor:
    """One level on the way up: the skips joined from the last to the first, then upsampled to `size` or twice."""
    crosses = has_cross_attention(m)
    if obstacle(m):
        extra = cond.for_attention() if crosses else {}
        extra["res_hidden_states_tuple"] = tuple(map(for_stock, skips))
        return from_stock(m(hidden_states=for_stock(x), temb=cond.temb, upsample_size=size, **extra))
    give_back_before(x)
    for i, layer in enumerate(m.resnets):
        x = recomputed(m, resnet, layer, x, cond, None, skips[-1 - i])
        if crosses:
            x = transformer(m.attentions[i], x, cond)  # recomputes each of its blocks
        elif type(m) is AttnUpBlock2D:
            x = recomputed(m, image_attention, m.attentions[i], x, cond)
    for layer in m.upsamplers or ():
        x = resample(layer, x, cond, size)
    return x


def give_back_before(x: torch.Tensor) -> None:
    """Before a level whose picture is large, the memory that the levels before it freed goes back to the system.

    malloc keeps blocks of up to 32 MiB: of a 128x128 latent in SD1.5's size some 300 MiB, as much as is in use.
    """
    if is_large(x, x.numel(), LARGE):
        give_back_freed()


def is_large(x: torch.Tensor, size: int, least: int) -> bool:
    """Whether `size` values of x's dtype are `least` bytes, of a picture that our functions alone see, on a CPU."""
    return not torch.compiler.is_compiling() and folds(x) and size * x.element_size() >= least


def has_cross_attention(m: nn.Module) -> bool:
    return getattr(m, "has_cross_attention", False)
