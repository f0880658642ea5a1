"""The LDM paper's encoders as ldmfast's conditioners: their settings from shapes and family, and their names."""

from __future__ import annotations

import re
from collections.abc import Iterable

from ldmfast import conditioning
from ldmfast.conditioning import CONDITIONERS
from ldmfast.conditioning.base import Conditioner
from ldmfast.released.families import DENOISERS
from ldmfast.released.keys import Entry

Table = dict[str, tuple[int, ...]]

# the conditioner's own name -> the released one
_NAMES = (
    (r"^rescaler\.channel_mapper\.", r"channel_mapper."),
    (r"^transformer\.token_embedding\.", r"transformer.token_emb."),
    (r"^transformer\.position_embedding\.", r"transformer.pos_emb.emb."),
    (r"\.mlp\.0\.", r".mlp.net.0.0."),
    (r"\.mlp\.2\.", r".mlp.net.2."),
)
_HEAD = 64  # the width of a head in x-transformers


def conditioner_config(table: Table, names: list[str], settings: dict, joined: int) -> dict:
    """The config.json of the conditioner that a released checkpoint holds.

    table     its tensors without prefix
    names     the rows of families.py that the model may be
    settings  its original configuration, where given
    joined    channels that the denoiser takes beside the latent
    """
    condition = next((DENOISERS[name].condition for name in names), None)
    given = settings.get("cond_stage_config", {})
    given = given.get("params", {}) if isinstance(given, dict) else {}
    if "embedding.weight" in table:
        rows, width = table["embedding.weight"]
        unconditional = "cin256-v2" in names  # its last class says that there is none
        return {
            "_class_name": "ClassEmbedder",
            "classes": rows - unconditional,
            "width": width,
            "unconditional": unconditional,
            "mode": "crossattn",
        }
    if "channel_mapper.weight" in table:
        width, classes = table["channel_mapper.weight"][:2]
        return {
            "_class_name": "MapEncoder",
            "classes": classes,
            "width": width,
            "stages": given.get("n_stages", 2),
            "palette": None,
            "bias": "channel_mapper.bias" in table,
        }
    if "transformer.token_emb.weight" in table:
        boxes = condition == "boxes" if "use_tokenizer" not in given else not given["use_tokenizer"]
        return _transformer_config(table, boxes)
    if condition == "masked":
        return {"_class_name": "MaskedImage", "channels": joined, "style": "ldm"}
    if condition == "picture":
        return {"_class_name": "LowResolution", "channels": joined, "encoded": False}
    if joined:
        raise ValueError(f"the denoiser takes {joined} channels beside the latent, and what they are is not known")
    return {"_class_name": "Unconditional"}


def _transformer_config(table: Table, boxes: bool) -> dict:
    vocabulary, width = table["transformer.token_emb.weight"]
    layers = {int(found[1]) for n in table if (found := re.match(r"transformer\.attn_layers\.layers\.(\d+)\.", n))}
    tokens = table["transformer.pos_emb.emb.weight"][0]
    heads = table["transformer.attn_layers.layers.0.1.to_q.weight"][0] // _HEAD
    common = {"width": width, "layers": len(layers) // 2, "vocabulary": vocabulary, "heads": heads, "head_width": _HEAD}
    if not boxes:
        return {"_class_name": "TransformerText", **common, "tokens": tokens, "tokenizer": "minilm"}
    # three tokens an object; two more where the sequence ends with what part of the picture is seen
    return {
        "_class_name": "LayoutEncoder",
        **common,
        "classes": min(601, vocabulary - 1),
        "objects": tokens // 3,
        "crop": tokens % 3 == 2,
    }


def conditioner_entries(own: Iterable[str]) -> list[Entry]:
    """The conditioner's table from the names of its tensors; released names without prefix."""
    entries = []
    for name in own:
        released = name
        for pattern, written in _NAMES:
            released = re.sub(pattern, written, released)
        entries.append(Entry(_layer(released), (name,)))
    return entries


def _layer(name: str) -> str:
    """A block of ours is two layers of the released module: attention, then feed-forward, each [norm, itself]."""
    found = re.match(r"transformer\.blocks\.(\d+)\.(attention|mlp)(_norm)?\.(.+)", name)
    if not found:
        return name
    number, kind, is_norm, inner = found.groups()
    return f"transformer.attn_layers.layers.{2 * int(number) + (kind == 'mlp')}.{0 if is_norm else 1}.{inner}"


def make_conditioner(config: dict) -> Conditioner:
    """A conditioner of that config.json, its weights random. Raises ValueError for a class that is not known."""
    settings = {k: v for k, v in config.items() if k != "_class_name"}
    name = config.get("_class_name")
    if name not in CONDITIONERS:
        raise ValueError(f"a conditioner of class {name} is not known; expected one of {', '.join(CONDITIONERS)}")
    if name == "Hybrid":
        raise ValueError("several conditioners side by side (Hybrid) have no place in the released layout")
    return getattr(conditioning, name).from_settings(settings)
