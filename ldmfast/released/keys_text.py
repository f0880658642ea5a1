"""The encoders of the condition: which one a released checkpoint holds, its configuration, and its table of names.

CLIP's text tower comes in two layouts: transformers' own (Stable Diffusion 1, SDXL's first) and OpenCLIP's
(Stable Diffusion 2, SDXL's second). The encoders of the LDM paper become ldmfast's conditioners.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ldmfast.released.keys import Entry

Table = dict[str, tuple[int, ...]]
SECOND = "conditioner.embedders.1.model."


@dataclass(frozen=True)
class Place:
    """Where a checkpoint has an encoder.   layout  clip, openclip, or a condition of families.py"""

    prefix: str
    part: str
    layout: str


_PLACES = (  # a tensor that shows it, where it is, what the condition is called
    (
        "conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight",
        Place("conditioner.embedders.0.transformer.", "text_encoder", "clip"),
        "two",
    ),
    (SECOND + "token_embedding.weight", Place(SECOND, "text_encoder_2", "openclip"), "two"),
    (
        "conditioner.embedders.0.model.token_embedding.weight",
        Place("conditioner.embedders.0.model.", "text_encoder_2", "openclip"),
        "openclip",
    ),
    (
        "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight",
        Place("cond_stage_model.transformer.", "text_encoder", "clip"),
        "clip",
    ),
    (
        "cond_stage_model.model.token_embedding.weight",
        Place("cond_stage_model.model.", "text_encoder", "openclip"),
        "openclip",
    ),
    ("cond_stage_model.transformer.token_emb.weight", Place("cond_stage_model.", "conditioner", "text"), "text"),
    ("cond_stage_model.embedding.weight", Place("cond_stage_model.", "conditioner", "class"), "class"),
    ("cond_stage_model.channel_mapper.weight", Place("cond_stage_model.", "conditioner", "map"), "map"),
    ("cond_stage_model.encoder.conv_in.weight", None, "masked"),  # a second copy of the autoencoder
)


def places(table: Table) -> tuple[list[Place], set[str]]:
    """(the encoders in a checkpoint; the conditions that a model with them can have, empty if nothing shows it)"""
    found = [(place, name) for mark, place, name in _PLACES if mark in table]
    conditions = {name for _, name in found}
    if "text" in conditions:  # one module for captions and for boxes: the U-Net shows which
        conditions.add("boxes")
    return [place for place, _ in found if place], conditions


def clip_config(table: Table, place: Place) -> dict:
    """The configuration of CLIPTextModel, or with a projection CLIPTextModelWithProjection, from its shapes."""
    own = {name.removeprefix(place.prefix): shape for name, shape in table.items() if name.startswith(place.prefix)}
    clip = place.layout == "clip"
    vocabulary, width = own["text_model.embeddings.token_embedding.weight" if clip else "token_embedding.weight"]
    positions = own["text_model.embeddings.position_embedding.weight" if clip else "positional_embedding"][0]
    block = "text_model.encoder.layers" if clip else "transformer.resblocks"
    layers = 1 + max(int(n.removeprefix(block + ".").split(".")[0]) for n in own if n.startswith(block))
    inner = own[f"{block}.0.mlp.{'fc1' if clip else 'c_fc'}.weight"][0]
    projects = place.part == "text_encoder_2"
    config = {
        "architectures": ["CLIPTextModelWithProjection" if projects else "CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "max_position_embeddings": positions,
        "num_hidden_layers": layers if clip or projects else layers - 1,  # Stable Diffusion 2 stops before the last
        "num_attention_heads": max(width // 64, 1),
        "intermediate_size": inner,
        "hidden_act": "quick_gelu" if clip else "gelu",
        "projection_dim": width if clip or not projects else own["text_projection"][1],
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": vocabulary - 1 if clip else 0,
    }
    return config


def clip_keys(config: dict) -> list[str]:
    """The names of a saved text tower, as every published folder has them."""
    parts = [f"self_attn.{p}_proj" for p in ("q", "k", "v", "out")]
    parts += ["layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2"]
    layers = [f"encoder.layers.{i}.{p}" for i in range(config["num_hidden_layers"]) for p in parts]
    names = ["embeddings.token_embedding.weight", "embeddings.position_embedding.weight"]
    names += [f"{layer}.{kind}" for layer in (*layers, "final_layer_norm") for kind in ("weight", "bias")]
    projection = ["text_projection.weight"] if config["architectures"][0].endswith("Projection") else []
    return ["text_model." + name for name in names] + projection


_OPENCLIP = (
    (r"^text_model\.embeddings\.token_embedding\.", r"token_embedding."),
    (r"^text_model\.embeddings\.position_embedding\.weight$", r"positional_embedding"),
    (r"^text_model\.final_layer_norm\.", r"ln_final."),
    (r"^text_projection\.weight$", r"text_projection"),
    (r"^text_model\.encoder\.layers\.(\d+)\.", r"transformer.resblocks.\1."),
    (r"\.layer_norm(\d)\.", r".ln_\1."),
    (r"\.mlp\.fc1\.", r".mlp.c_fc."),
    (r"\.mlp\.fc2\.", r".mlp.c_proj."),
    (r"\.self_attn\.out_proj\.", r".attn.out_proj."),
    (r"\.self_attn\.[qkv]_proj\.(weight|bias)", r".attn.in_proj_\1"),
)


def clip_entries(config: dict, layout: str) -> list[Entry]:
    """The text tower's table, released names without prefix."""
    keys = clip_keys(config)
    if layout == "clip":
        return [Entry(key, (key,)) for key in keys]
    groups: dict[str, list[str]] = {}
    for key in keys:
        name = key
        for pattern, written in _OPENCLIP:
            name = re.sub(pattern, written, name)
        groups.setdefault(name, []).append(key)
    return [Entry(name, tuple(keys), transpose=name == "text_projection") for name, keys in groups.items()]
