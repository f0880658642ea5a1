"""What a function of ours may stand in for: the kinds of modules, and the condition on each beyond being unmodified.

Each condition answers with the reason why a module must be called as it is, as a clause, or with None.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from diffusers.models import embeddings
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
from torch.utils.checkpoint import checkpoint

from ldmfast.models import originals

_BY_DEFAULT_OF = "diffusers.models.modeling_utils"
_BY_DEFAULT = "ModelMixin.enable_gradient_checkpointing."
_PARAMETRIC = (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm)


def _no_limit(m) -> str | None:
    return None


def _checkpointed(m: nn.Module) -> str | None:
    on = getattr(m, "gradient_checkpointing", False) and torch.is_grad_enabled()
    return "gradient checkpointing is on" if on else None


def _recomputed(m: nn.Module) -> str | None:
    """A checkpointing function that is not torch's may look at the module that it is given."""
    if not _checkpointed(m):
        return None
    function = m._gradient_checkpointing_func
    while isinstance(function, functools.partial):
        function = function.func
    name = getattr(function, "__qualname__", type(function).__name__)
    known = function is checkpoint or (name.startswith(_BY_DEFAULT) and function.__module__ == _BY_DEFAULT_OF)
    return None if known else f"its layers are checkpointed by {name}"


def _dropout(m: nn.Dropout) -> str | None:
    return "it drops values" if m.training and m.p > 0 else None


def _conv2d(m: nn.Conv2d) -> str | None:
    if m.padding_mode != "zeros":
        return f"its padding mode is {m.padding_mode}"
    if type(m.padding) is tuple and type(m.stride) is tuple and type(m.dilation) is tuple:
        return None
    return f"its stride, padding and dilation are {m.stride!r}, {m.padding!r} and {m.dilation!r}"


def _timesteps(m: Timesteps) -> str | None:
    if embeddings.get_timestep_embedding is not _SINUSOID:
        return "diffusers' get_timestep_embedding was replaced"
    return None if m.scale == 1 else "its timesteps are scaled"


def _timestep_embedding(m: TimestepEmbedding) -> str | None:
    return "its activations are not one SiLU" if m.post_act is not None else _silu(m.act)


def _in_place(m: nn.SiLU) -> str | None:
    return "it works in place" if m.inplace else None


def _silu(activation: nn.Module) -> str | None:
    """Why an activation that we never call may not be left out of account."""
    if type(activation) is not nn.SiLU:
        return "its activation is not SiLU"
    why = modified(activation, nn.SiLU) or _in_place(activation)
    return None if why is None else f"of its activation: {why}"


def _attention(m: Attention) -> str | None:
    processor = type(m.processor)
    if processor not in _PROCESSORS:
        return f"its attention processor is {processor.__name__}"
    if processor.__call__ is not _PROCESSORS[processor]:
        return f"{processor.__name__}.__call__ was replaced"
    if m.fused_projections:
        return "its projections are fused"
    if processor is AttnProcessor and m.scale != (getattr(m.to_q, "out_features", m.inner_dim) / m.heads) ** -0.5:
        return f"its scale is {m.scale}"  # the newer processor does not read it
    if len(m.to_out) != 2 or type(m.to_out[1]) is not nn.Dropout and type(m.to_out[1]) in LIMITS:
        return "its to_out is not a linear layer and a dropout"
    extras = (m.spatial_norm, m.norm_cross, m.norm_q, m.norm_k, m.added_kv_proj_dim)
    return None if m.scale_qk and all(extra is None for extra in extras) else "it normalises queries, keys or context"


def _feed_forward(m: FeedForward) -> str | None:
    if len(m.net) > 1 and type(m.net[1]) is not nn.Dropout and type(m.net[1]) in LIMITS:
        return f"its second layer is a {type(m.net[1]).__name__}"
    return None


def _transformer_block(m: BasicTransformerBlock) -> str | None:
    if m._chunk_size is not None:
        return "its feed-forward is chunked"
    return None if m.norm_type == "layer_norm" and m.pos_embed is None else f"its norm is {m.norm_type}"


def _transformer(m: Transformer2DModel) -> str | None:
    return _recomputed(m) if m.is_input_continuous else "its input is not continuous"


def _resnet(m: ResnetBlock2D) -> str | None:
    if m.time_emb_proj is not None and m.time_embedding_norm not in ("default", "scale_shift"):
        return f"its time_embedding_norm is {m.time_embedding_norm}"
    filtered = any(r is not None and type(r) not in (Upsample2D, Downsample2D) for r in (m.upsample, m.downsample))
    return "it resamples through a filter of its own" if filtered else _silu(m.nonlinearity)


def _downsample(m: Downsample2D) -> str | None:
    return None if m.norm is None else "it normalises"


def _upsample(m: Upsample2D) -> str | None:
    if m.norm is not None or m.use_conv_transpose:
        return "it normalises or transposes"
    return None if m.name == "conv" else f"its layer is named {m.name}"


def _resampling(m: nn.Module) -> str | None:
    for name in ("downsamplers", "upsamplers"):
        for layer in m._modules.get(name) or ():
            if type(layer) not in (Downsample2D, Upsample2D, ResnetBlock2D) and type(layer) in LIMITS:
                return f"one of its {name} is a {type(layer).__name__}"
    return _recomputed(m)


def _up_block(m: nn.Module) -> str | None:
    if any(getattr(m, name, None) for name in ("s1", "s2", "b1", "b2")):
        return "FreeU is on"
    return _resampling(m)


# Every module that a function of ours stands in for: the condition under which it can, beyond being unmodified.
LIMITS: dict[type, Callable] = {
    nn.Linear: _no_limit,
    nn.Conv2d: _conv2d,
    nn.GroupNorm: _no_limit,
    nn.LayerNorm: _no_limit,
    nn.Dropout: _dropout,
    nn.SiLU: _in_place,
    GEGLU: _no_limit,
    FeedForward: _feed_forward,
    Timesteps: _timesteps,
    TimestepEmbedding: _timestep_embedding,
    Attention: _attention,
    BasicTransformerBlock: _transformer_block,
    Transformer2DModel: _transformer,
    ResnetBlock2D: _resnet,
    Downsample2D: _downsample,
    Upsample2D: _upsample,
    DownBlock2D: _resampling,
    CrossAttnDownBlock2D: _resampling,
    AttnDownBlock2D: _resampling,
    ResnetDownsampleBlock2D: _resampling,
    UNetMidBlock2D: _recomputed,
    UNetMidBlock2DCrossAttn: _recomputed,
    UpBlock2D: _up_block,
    CrossAttnUpBlock2D: _up_block,
    AttnUpBlock2D: _up_block,
    ResnetUpsampleBlock2D: _up_block,
    DownEncoderBlock2D: _resampling,
    UpDecoderBlock2D: _resampling,
    AttnDownEncoderBlock2D: _resampling,
    AttnUpDecoderBlock2D: _resampling,
    VectorQuantizer: _no_limit,
    Encoder: _checkpointed,
    Decoder: _checkpointed,
}
# Where one of them stands that our function for its parent takes for another; what is not of them is called.
PLACES: dict[type, tuple[tuple[str, type], ...]] = {
    ResnetBlock2D: (
        ("norm1", nn.GroupNorm),
        ("norm2", nn.GroupNorm),
        ("conv1", nn.Conv2d),
        ("conv2", nn.Conv2d),
        ("conv_shortcut", nn.Conv2d),
        ("time_emb_proj", nn.Linear),
        ("dropout", nn.Dropout),
    ),
    BasicTransformerBlock: (("norm1", nn.LayerNorm), ("norm2", nn.LayerNorm), ("norm3", nn.LayerNorm)),
    Attention: (("group_norm", nn.GroupNorm), ("to_q", nn.Linear), ("to_k", nn.Linear), ("to_v", nn.Linear)),
    Transformer2DModel: (("norm", nn.GroupNorm),),
    Downsample2D: (("conv", nn.Conv2d),),
    Upsample2D: (("conv", nn.Conv2d),),
    TimestepEmbedding: (("linear_1", nn.Linear), ("linear_2", nn.Linear)),
    Encoder: (("conv_norm_out", nn.GroupNorm),),
    Decoder: (("conv_norm_out", nn.GroupNorm),),
}
ALWAYS_CALLED = (nn.GELU, nn.Identity, nn.Embedding, nn.AvgPool2d)

# What stock's code was. A class whose method somebody replaces later is not what our function stands in for.
_PROCESSORS = {kind: dict(originals.methods(kind))["__call__"] for kind in (AttnProcessor2_0, AttnProcessor)}
_SINUSOID = embeddings.get_timestep_embedding
_METHODS = {kind: originals.methods(kind) for kind in (*LIMITS, *ALWAYS_CALLED)}
_METHODS[Attention] = originals.methods(Attention, *(kind.__call__ for kind in _PROCESSORS))
FUNCTIONS = originals.functions((*LIMITS, *_PROCESSORS))


def modified(module: nn.Module, kind: type) -> str | None:
    """What was attached to a module or its class, as a clause."""
    if name := originals.replaced(module, kind, _METHODS[kind]):
        return (
            "its forward is wrapped (offloading, layerwise casting or a patch)"
            if name == "forward"
            else f"its {name} was replaced"
        )
    state = module.__dict__
    if (
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
    ):
        return "it has hooks"
    if state.get("_compiled_call_impl") is not None:
        return "it was compiled by itself"
    if kind in _PARAMETRIC and type(module.weight) not in (nn.Parameter, torch.Tensor, type(None)):
        return f"its weight is a {type(module.weight).__name__}"
    return None


def misplaced(module: nn.Module, kind: type) -> str | None:
    """Which child of a module, if any, is of a kind that its place is not for, as a clause."""
    children = module._modules
    for name, wanted in PLACES[kind]:
        child = type(children.get(name))
        if child is not wanted and child in LIMITS:
            return f"its {name} is a {child.__name__}"
    return None
