"""What a released checkpoint is, from the names and shapes of its tensors alone.

`unet_structure` and `autoencoder_structure` read the released layout (openaimodel's `input_blocks`, the autoencoder's
`encoder.down`); `unet_config` and `autoencoder_config` write what they found as diffusers' configurations.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

from ldmfast.released.families import Autoencoder, Structure

Table = dict[str, tuple[int, ...]]


def unet_structure(table: Table) -> Structure:
    """Read a U-Net in the released layout, names without prefix. Raises ValueError saying what does not fit."""
    levels, layers, updown = _levels(table)
    first = [1 + level * (layers + 1) for level in range(levels)]  # the first block of each level on the way down
    ch = table["input_blocks.0.0.weight"][0]
    channels = [_need(table, f"input_blocks.{i}.0.out_layers.3.weight")[0] for i in first]
    attention = tuple(_attends(table, f"input_blocks.{i}.1") for i in first)
    depth = tuple(_depth(table, f"input_blocks.{i}.1") for i in first)
    keys = next((shape[1] for name, shape in table.items() if name.endswith("attn2.to_k.weight")), None)
    if any(c % ch for c in channels):
        raise ValueError(f"the U-Net's levels have {channels} channels, which are no multiples of the first {ch}")
    label, classes = table.get("label_emb.0.0.weight"), table.get("label_emb.weight")
    return Structure(
        inputs=table["input_blocks.0.0.weight"][1],
        outputs=_need(table, "out.2.weight")[0],
        ch=ch,
        mult=tuple(c // ch for c in channels),
        attention=attention,
        layers=layers,
        depth=depth,
        mid_depth=_depth(table, "middle_block.1"),
        context=keys,
        scale_shift=_need(table, "input_blocks.1.0.emb_layers.1.weight")[0] == 2 * channels[0],
        updown=updown,
        linear=any(name.endswith(".1.proj_in.weight") and len(shape) == 2 for name, shape in table.items()),
        label=label and label[1],
        classes=classes and classes[0],
    )


def _levels(table: Table) -> tuple[int, int, bool]:
    """(levels, residual blocks a level, whether residual blocks resample), from where the way up resamples."""
    numbers = [_count(table, name) for name in ("input_blocks", "output_blocks")]
    ups = [(i, k) for i in range(numbers[1]) for k in (1, 2) if _any(table, f"output_blocks.{i}.{k}.conv.")]
    residual = [(i, k) for i in range(numbers[1]) for k in (1, 2) if _any(table, f"output_blocks.{i}.{k}.in_layers.")]
    places = [i for i, _ in ups or residual]
    layers = places[0] if places else numbers[1] - 1
    levels = len(places) + 1
    if layers < 1 or numbers != [levels * (layers + 1)] * 2:
        raise ValueError(
            f"the U-Net has {numbers[0]} input and {numbers[1]} output blocks and resamples after {places}: "
            "no arrangement of levels that the released code makes"
        )
    return levels, layers, bool(residual) and not ups


def _any(table: Table, prefix: str) -> bool:
    return any(name.startswith(prefix) for name in table)


def _count(table: Table, name: str) -> int:
    return len({key.split(".")[1] for key in table if key.startswith(name + ".")})


def _need(table: Table, name: str) -> tuple[int, ...]:
    if name not in table:
        raise ValueError(f"the U-Net has no {name}")
    return table[name]


def _attends(table: Table, prefix: str) -> bool:
    return f"{prefix}.qkv.weight" in table or _depth(table, prefix) > 0


def _depth(table: Table, prefix: str) -> int:
    blocks = itertools.takewhile(lambda d: f"{prefix}.transformer_blocks.{d}.norm1.weight" in table, itertools.count())
    return len(list(blocks))


def unet_config(s: Structure, heads: Callable[[int], int], sample_size: int) -> dict:
    """The configuration of UNet2DConditionModel, or of UNet2DModel where nothing crosses.

    heads   channels -> heads
    """
    channels = [s.ch * m for m in s.mult]
    common = {
        "sample_size": sample_size,
        "in_channels": s.inputs,
        "out_channels": s.outputs,
        "block_out_channels": channels,
        "layers_per_block": s.layers,
        "norm_eps": 1e-5,
        "num_class_embeds": s.classes,
    }
    if s.context is None:
        return {"_class_name": "UNet2DModel", **common, **_plain_config(s, channels, heads)}
    return {"_class_name": "UNet2DConditionModel", **common, **_cross_config(s, channels, heads)}


def _plain_config(s: Structure, channels: list[int], heads) -> dict:
    widths = [c // heads(c) for c in channels]
    last = len(channels) - 1
    down = ["AttnDownBlock2D" if a else "DownBlock2D" for a in s.attention]
    up = ["AttnUpBlock2D" if a else "UpBlock2D" for a in s.attention]
    if s.updown:  # a level without attention whose last step is a residual block has a class of its own
        down = ["ResnetDownsampleBlock2D" if k == "DownBlock2D" and i < last else k for i, k in enumerate(down)]
        up = ["ResnetUpsampleBlock2D" if k == "UpBlock2D" and i > 0 else k for i, k in enumerate(up)]
    resample = "resnet" if s.updown else "conv"
    return {
        "down_block_types": down,
        "up_block_types": up[::-1],
        "attention_head_dim": widths[0] if len(set(widths)) == 1 else widths,
        "attn_norm_num_groups": 32,
        "resnet_time_scale_shift": "scale_shift" if s.scale_shift else "default",
        "downsample_type": resample,
        "upsample_type": resample,
    }


def _cross_config(s: Structure, channels: list[int], heads) -> dict:
    if s.scale_shift or s.updown:
        raise ValueError("a U-Net with cross-attention and residual blocks that resample or scale is not supported")
    counts = [heads(c) for c in channels]
    # a level without attention has a number too; the last one's is the middle's
    depth = [*(d or 1 for d in s.depth[:-1]), s.mid_depth or 1]
    if s.attention[-1] and s.depth[-1] != s.mid_depth:
        raise ValueError(f"the last level has {s.depth[-1]} transformer blocks and the middle {s.mid_depth}")
    config = {
        "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in s.attention],
        "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in s.attention[::-1]],
        "attention_head_dim": counts[0] if len(set(counts)) == 1 else counts,  # diffusers' name; it is their number
        "cross_attention_dim": s.context,
        "transformer_layers_per_block": depth[0] if len(set(depth)) == 1 else depth,
        "use_linear_projection": s.linear,
    }
    if s.label is not None:
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": s.label,
        }
    return config


def autoencoder_structure(table: Table) -> tuple[Autoencoder, dict]:
    """(the autoencoder, what else its configuration needs), names without prefix. Raises ValueError."""
    levels = 1 + max((int(n.split(".")[2]) for n in table if n.startswith("encoder.down.")), default=-1)
    if not levels or "encoder.conv_in.weight" not in table:
        raise ValueError("the autoencoder has no encoder in the released layout (encoder.conv_in, encoder.down)")
    ch, inputs = table["encoder.conv_in.weight"][:2]
    channels = [table[f"encoder.down.{i}.block.0.conv1.weight"][0] for i in range(levels)]
    codebook = table.get("quantize.embedding.weight")
    z = table["decoder.conv_in.weight"][1]
    found = Autoencoder(
        z=z,
        mult=tuple(c // ch for c in channels),
        codebook=codebook and codebook[0],
        attention=tuple(i for i in range(levels) if f"encoder.down.{i}.attn.0.q.weight" in table),
        mid_attention="encoder.mid.attn_1.q.weight" in table,
        ch=ch,
    )
    layers = 1 + max(int(n.split(".")[4]) for n in table if n.startswith("encoder.down.0.block."))
    more = {"in_channels": inputs, "out_channels": table["decoder.conv_out.weight"][0], "layers_per_block": layers}
    if codebook:
        more["vq_embed_dim"] = codebook[1]
    else:
        more |= {f"use_{name}": f"{name}.weight" in table for name in ("quant_conv", "post_quant_conv")}
    return found, more


def autoencoder_config(f: Autoencoder, more: dict, scale_factor: float, sample_size: int) -> dict:
    """The configuration of AutoencoderKL or VQModel."""
    levels = range(len(f.mult))
    config = {
        "_class_name": "VQModel" if f.codebook else "AutoencoderKL",
        "block_out_channels": [f.ch * m for m in f.mult],
        "down_block_types": ["AttnDownEncoderBlock2D" if i in f.attention else "DownEncoderBlock2D" for i in levels],
        "up_block_types": ["AttnUpDecoderBlock2D" if i in f.attention else "UpDecoderBlock2D" for i in levels][::-1],
        "latent_channels": f.z,
        "mid_block_add_attention": f.mid_attention,
        "sample_size": sample_size,
        "scaling_factor": scale_factor,
        **more,
    }
    return {**config, "num_vq_embeddings": f.codebook} if f.codebook else config
