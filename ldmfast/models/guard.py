"""The one guard: may a module be read and expanded, or must it be called?

A model's modules are diffusers' own, and our functions stand in for their `forward`. LoRA, hooks, offloading,
layerwise casting, compiling of blocks, attention processors and quantisation all work by replacing, wrapping or
reconfiguring modules. So every function in `layers.py` and `blocks.py` asks `obstacle(module)` first, and where there
is one it calls the module, which then does all that its owner meant it to do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from diffusers.models.autoencoders.vae import Decoder, Encoder, VectorQuantizer
from diffusers.models.downsampling import Downsample2D
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_blocks import (
    AttnDownBlock2D,
    AttnDownEncoderBlock2D,
    AttnUpBlock2D,
    AttnUpDecoderBlock2D,
    CrossAttnDownBlock2D,
    CrossAttnUpBlock2D,
    DownBlock2D,
    DownEncoderBlock2D,
    ResnetDownsampleBlock2D,
    ResnetUpsampleBlock2D,
    UNetMidBlock2D,
    UNetMidBlock2DCrossAttn,
    UpBlock2D,
    UpDecoderBlock2D,
)
from diffusers.models.upsampling import Upsample2D
from torch import nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_PARAMETRIC = (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm)


def _no_limit(m) -> str | None:
    return None


def _checkpointed(m) -> str | None:
    return "gradient checkpointing is on" if m.gradient_checkpointing and torch.is_grad_enabled() else None


def _dropout(m: nn.Dropout) -> str | None:
    return "it drops values" if m.training and m.p > 0 else None


def _timesteps(m: Timesteps) -> str | None:
    return None if m.scale == 1 else "its timesteps are scaled"


def _timestep_embedding(m: TimestepEmbedding) -> str | None:
    return None if type(m.act) is nn.SiLU and m.post_act is None else "its activations are not one SiLU"


def _attention(m: Attention) -> str | None:
    if type(m.processor) not in (AttnProcessor2_0, AttnProcessor):
        return f"its attention processor is {type(m.processor).__name__}"
    if m.fused_projections:
        return "its projections are fused"
    extras = (m.spatial_norm, m.norm_cross, m.norm_q, m.norm_k, m.added_kv_proj_dim)
    return None if m.scale_qk and all(extra is None for extra in extras) else "it normalises queries, keys or context"


def _transformer_block(m: BasicTransformerBlock) -> str | None:
    if m._chunk_size is not None:
        return "its feed-forward is chunked"
    return None if m.norm_type == "layer_norm" and m.pos_embed is None else f"its norm is {m.norm_type}"


def _transformer(m: Transformer2DModel) -> str | None:
    return None if m.is_input_continuous else "its input is not continuous"


def _resnet(m: ResnetBlock2D) -> str | None:
    if type(m.nonlinearity) is not nn.SiLU:
        return "its activation is not SiLU"
    filtered = any(r is not None and type(r) not in (Upsample2D, Downsample2D) for r in (m.upsample, m.downsample))
    return "it resamples through a filter of its own" if filtered else None


def _resample(m: Downsample2D | Upsample2D) -> str | None:
    if m.norm is not None or getattr(m, "use_conv_transpose", False):
        return "it normalises or transposes"
    return None if m.name == "conv" or m.name == "op" else f"its layer is named {m.name}"


def _up_block(m: nn.Module) -> str | None:
    if any(getattr(m, name, None) for name in ("s1", "s2", "b1", "b2")):
        return "FreeU is on"
    return None


# Every module that a function of ours stands in for: the condition under which it can, beyond being unmodified.
_LIMITS: dict[type, Callable] = {
    nn.Linear: _no_limit,
    nn.Conv2d: _no_limit,
    nn.GroupNorm: _no_limit,
    nn.LayerNorm: _no_limit,
    nn.Dropout: _dropout,
    GEGLU: _no_limit,
    FeedForward: _no_limit,
    Timesteps: _timesteps,
    TimestepEmbedding: _timestep_embedding,
    Attention: _attention,
    BasicTransformerBlock: _transformer_block,
    Transformer2DModel: _transformer,
    ResnetBlock2D: _resnet,
    Downsample2D: _resample,
    Upsample2D: _resample,
    DownBlock2D: _no_limit,
    CrossAttnDownBlock2D: _no_limit,
    AttnDownBlock2D: _no_limit,
    ResnetDownsampleBlock2D: _no_limit,
    UNetMidBlock2D: _no_limit,
    UNetMidBlock2DCrossAttn: _no_limit,
    UpBlock2D: _up_block,
    CrossAttnUpBlock2D: _up_block,
    AttnUpBlock2D: _up_block,
    ResnetUpsampleBlock2D: _up_block,
    DownEncoderBlock2D: _no_limit,
    UpDecoderBlock2D: _no_limit,
    AttnDownEncoderBlock2D: _no_limit,
    AttnUpDecoderBlock2D: _no_limit,
    VectorQuantizer: _no_limit,
    Encoder: _checkpointed,
    Decoder: _checkpointed,
}
# A class whose forward somebody replaces later is no longer the class that our function stands in for.
_FORWARD = {kind: kind.forward for kind in _LIMITS}


def obstacle(module: nn.Module) -> str | None:
    """Why `module` must be called as it is, as a clause; None if it is plain."""
    kind = type(module)
    stock = _FORWARD.get(kind)
    if stock is None:
        return f"{kind.__module__.partition('.')[0]}'s {kind.__name__} is not a layer that ldmfast knows"
    state = module.__dict__
    own = state.get("forward")  # a hook that was removed leaves the class's own forward behind
    if kind.forward is not stock or (own is not None and getattr(own, "__func__", None) is not stock):
        return "its forward is wrapped (offloading, layerwise casting or a patch)"
    if any(state[hooks] for hooks in _HOOKS):
        return "it has hooks"
    if state.get("_compiled_call_impl") is not None:
        return "it was compiled by itself"
    if kind in _PARAMETRIC and type(module.weight) not in (nn.Parameter, torch.Tensor, type(None)):
        return f"its weight is a {type(module.weight).__name__}"
    return _LIMITS[kind](module)


def plain(module: nn.Module) -> bool:
    """Whether `module` does what its class says and no more, so that its parameters may be read in its place."""
    return obstacle(module) is None


def obstacles(model: nn.Module) -> Iterator[tuple[str, str]]:
    """(name, reason) of the outermost modules inside `model` that would be called rather than expanded."""
    for name, child in model.named_children():
        reason = obstacle(child)
        if reason is None or type(child) in _LOOK_INSIDE:
            for inner, why in obstacles(child):
                yield f"{name}.{inner}", why
        elif type(child) not in _ALWAYS_CALLED:
            yield name, reason


_LOOK_INSIDE = (nn.ModuleList,)
_ALWAYS_CALLED = (nn.LayerNorm, nn.Dropout, nn.SiLU, nn.GELU, nn.Identity, nn.Embedding, nn.AvgPool2d)


def explain(model: nn.Module) -> list[str]:
    """A sentence for each reason why some of the model's modules are called rather than expanded."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in obstacles(model):
        by_reason.setdefault(reason, []).append(name)
    sentences = []
    for reason, names in by_reason.items():
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        sentences.append(f"{shown}: called as it is, because {reason}.")
    return sentences
