"""The keys of LoRA files: whose layer one changes, and what its tensor is in that change.

A key is a prefix that names the network, a layer, and a suffix. kohya's and LyCORIS' write a layer's name with "_" for
".", and SDXL's by its released name (`input_blocks_4_1_...`); so layers are looked up by their flattened name, of both
kinds, among those that the network has.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import nn

from ldmfast.released.keys import unet_entries

UNET, TEXT, TEXT_2 = "unet", "text_encoder", "text_encoder_2"

# suffix of a key -> the tensor's role; the first that matches counts
_ROLES = (
    (r"\.lora_(?:down|A)(?:\.\w+)?\.weight", "down"),
    (r"\.lora_(?:up|B)(?:\.\w+)?\.weight", "up"),
    (r"\.lora_B(?:\.\w+)?\.bias", "bias"),
    (r"\.lora_mid\.weight", "mid"),
    (r"(?:\.lora|_lora|\.lora_linear_layer)\.down\.weight", "down"),
    (r"(?:\.lora|_lora|\.lora_linear_layer)\.up\.weight", "up"),
    (r"\.lora_magnitude_vector(?:\.\w+)?(?:\.weight)?", "magnitude"),
    (r"\.dora_scale", "magnitude"),
    (r"\.alpha", "alpha"),
    (r"\.hada_(w1_a|w1_b|w2_a|w2_b|t1|t2)(?:\.\w+)?", None),
    (r"\.(lokr_(?:w1|w1_a|w1_b|w2|w2_a|w2_b|t2))(?:\.\w+)?", None),
    (r"\.diff", "diff"),
    (r"\.diff_b", "bias"),
    (r"\.w_norm", "norm_weight"),
    (r"\.b_norm", "norm_bias"),
)
_ROLES = tuple((re.compile(f"(.+?){suffix}$"), role) for suffix, role in _ROLES)

# what is no sum of a weight and a matrix, by its true name
_OTHERS = (
    (r"\.(?:a1|a2|b1|b2|bm1|bm2)\.weight$|\.glora_", "GLoRA"),
    (r"\.oft_blocks$|\.oft_diag$|\.oft_[rR]\b", "OFT"),
    (r"\.boft_|\.boft_[rR]\b", "BOFT"),
    (r"\.on_input$|\.ia3_", "(IA)^3"),
    (r"\.vera_", "VeRA"),
    (r"\.bias_(?:indices|values|size)$", "LoRA with a sparse residual"),
    (r"^lora_controlnet$", "Control-LoRA"),
    (r"\.hra_", "HRA"),
)
_PREFIXES = (  # how a key begins, and the networks that its layer may be of
    (r"lora_unet_|lycoris_unet_|(?:model\.)?diffusion_model\.|(?:base_model\.model\.)?unet\.", (UNET,)),
    (r"lora_te2_|text_encoder_2\.", (TEXT_2,)),
    (r"lora_te1?_|text_encoder\.", (TEXT,)),
    (r"lycoris_|base_model\.model\.|", (UNET, TEXT, TEXT_2)),
)
_PREFIXES = tuple((re.compile(prefix), parts) for prefix, parts in _PREFIXES)
_OLD_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


@dataclass(frozen=True)
class Key:
    """parts  the networks that the layer may be of;   layer  its name as written;   role  the tensor's"""

    parts: tuple[str, ...]
    layer: str
    role: str


@functools.lru_cache(1 << 14)
def parse(key: str) -> Key | None:
    """A key of a LoRA file; None for a key of something else."""
    for pattern, role in _ROLES:
        if found := pattern.match(key):
            for prefix, parts in _PREFIXES:
                if start := prefix.match(found[1]):
                    return Key(parts, found[1][start.end() :], role or found[2])
    return None


def other_kind(keys: list[str]) -> str | None:
    """The name of the method whose file has such keys, where that is none of those that `parse` knows."""
    if any(key.endswith(".oft_blocks") for key in keys) and any(".rescale" in key for key in keys):
        return "OFT or BOFT"
    return next((name for pattern, name in _OTHERS if re.search(pattern, "\n".join(keys), re.MULTILINE)), None)


def layers(network: nn.Module) -> dict[str, nn.Module]:
    """{name: layer} of what has a weight, as they were before any adapter."""
    found, waiting = {}, [("", network)]
    while waiting:
        name, module = waiting.pop()
        while (inner := module._modules.get("base_layer")) is not None:
            module = inner
        tables = module._parameters, module._buffers, module.__dict__
        if any("weight" in table for table in tables) or hasattr(type(module), "weight"):
            found[name[1:]] = module
        waiting += [(f"{name}.{child}", inside) for child, inside in module._modules.items() if inside is not None]
    return found


@dataclass(frozen=True)
class LayerNames:
    """{flattened name: name} of a network's layers: as diffusers and transformers spell them, and as released files."""

    usual: dict[str, str]
    released: Callable[[], dict[str, str]]  # made when it is first asked for


def layer_names(part: str, network: nn.Module, known: Iterable[str]) -> LayerNames:
    """A network's `layers` in every spelling that files have.   known  their names"""
    names = {_flat(name): name for name in known}
    if part != UNET:
        own = {flat.removeprefix("text_model_"): name for flat, name in names.items()}
        old = {
            f"{flat.rpartition('_self_attn_')[0]}_self_attn_{o}": f"{flat.rpartition('_self_attn_')[0]}_self_attn_{n}"
            for flat in own
            for o, n in _OLD_TEXT.items()
            if flat.endswith("_self_attn_" + n)
        }
        own |= {spelt: own[flat] for spelt, flat in old.items()}
        return LayerNames(own | {f"text_model_{flat}": name for flat, name in own.items()}, dict)
    spelt = {flat.removesuffix("_0"): name for flat, name in names.items() if flat.endswith("to_out_0")}
    return LayerNames({**spelt, **names}, functools.cache(lambda: _released_names(network, names.values())))


def find(layer: str, names: LayerNames) -> str | None:
    """The name of a layer as a file spells it."""
    flat = _flat(layer.replace(".processor", ""))
    return names.usual.get(flat) or names.released().get(flat)


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _released_names(unet: nn.Module, known: Iterable[str]) -> dict[str, str]:
    """{flattened released name: name}; none for a network without a place in the released layout."""
    try:
        entries = unet_entries({f"{name}.weight": (1, 1) for name in known}, dict(unet.config), legacy=False)
    except (ValueError, KeyError):
        return {}
    single = {e.released: e.keys[0] for e in entries if len(e.keys) == 1}
    return {_flat(released.removesuffix(".weight")): key.removesuffix(".weight") for released, key in single.items()}
