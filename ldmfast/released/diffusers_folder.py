"""A `Model` (model.py) as a folder in diffusers' layout, and back, with every tensor as it is.

unet/ vae/ text_encoder/ conditioner/ scheduler/    the parts: config.json and a safetensors file each
model_index.json, ldmfast.json                      what pipelines read
released.safetensors, released.json                 what a released file held beside them, and how to go back
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import diffusers
import torch
from safetensors.torch import save_file

from ldmfast import files
from ldmfast.released.model import (
    AUTOENCODER,
    CONDITION,
    UNET,
    Model,
    Part,
    autoencoder_part,
    conditioner_part,
    text_part,
    unet_part,
)
from ldmfast.released.weights import check_variant, part_weights, read_weights

REST, RECORD = "released.safetensors", "released.json"
CARRIED = "ldmfast."  # before the tensors of parts that the released layout has no place for
_NETWORKS = ("unet", "vae", "vqvae", "")
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # before diffusers 0.18
_BARE = re.compile(r"^(embeddings\.|encoder\.|final_layer_norm\.)")  # transformers 5 saves without text_model.


def write_folder(model: Model, folder: Path) -> None:
    """Write the parts; the folder appears whole or not at all. Raises ValueError if it exists."""
    if folder.exists():
        raise ValueError(f"{folder} exists already; name another, or remove it")
    with files.new_folder(folder) as partial:
        _write_parts(model, partial)


def _write_parts(model: Model, folder: Path) -> None:
    carried, rest = _carried(model.rest)
    for where, part in model.parts.items():
        place = folder / where
        place.mkdir(parents=True, exist_ok=True)
        _write_json(place / "config.json", part.config)
        if tensors := part.tensors | carried.pop(where, {}):
            stem = "diffusion_pytorch_model" if where in _NETWORKS else "model"
            save(tensors, place / f"{stem}.safetensors")
    if model.schedule is not None:
        (folder / "scheduler").mkdir()
        _write_json(folder / "scheduler" / "scheduler_config.json", model.schedule)
        _write_json(folder / "model_index.json", model_index(model))
        _write_json(folder / "ldmfast.json", _pipeline_settings(model))
    for where, tensors in carried.items():
        (folder / where).mkdir(exist_ok=True)
        save(tensors, folder / where / "model.safetensors")
    if rest:
        save(rest, folder / REST)
    (folder / RECORD).write_text(json.dumps({"format": 1, **model.record}, indent=2, sort_keys=True) + "\n")
    for name, text in model.record.get("configs", {}).items():  # the very files that the parts once came with
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _carried(rest: dict[str, torch.Tensor]) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """({part: its tensors} of those that a released file carried along, what else there is)"""
    parts_of, others = {}, {}
    for name, value in rest.items():
        if name.startswith(CARRIED):
            where, _, key = name.removeprefix(CARRIED).partition("/")
            parts_of.setdefault(where, {})[key] = value
        else:
            others[name] = value
    return parts_of, others


def save(tensors: dict[str, torch.Tensor], path: Path, metadata: dict | None = None) -> None:
    """Write a safetensors file; tensors that share memory are written each for itself."""
    seen, own = set(), {}
    for name, value in tensors.items():
        value = value.contiguous()
        at = value.untyped_storage().data_ptr()
        own[name] = value.clone() if at in seen else value
        seen.add(at)
    save_file(own, path, metadata={"format": "pt", **(metadata or {})})


def model_index(model: Model) -> dict:
    """What a diffusers pipeline of these parts would save."""
    kind = pipeline_class(model)
    index = {"_class_name": kind or "LatentDiffusionPipeline", "_diffusers_version": diffusers.__version__}
    index["scheduler"] = ["diffusers", model.schedule["_class_name"]]
    for where, part in model.parts.items():
        if where in _NETWORKS:
            index[where] = ["diffusers", part.config["_class_name"]]
        elif where.startswith("text_encoder"):
            index[where] = ["transformers", part.config["architectures"][0]]
            index[where.replace("text_encoder", "tokenizer")] = [None, None]
    if kind and kind.startswith("StableDiffusion") and "XL" not in kind:
        index |= {name: [None, None] for name in ("safety_checker", "feature_extractor", "image_encoder")}
        index["requires_safety_checker"] = False
    return index


def pipeline_class(model: Model) -> str | None:
    """diffusers' pipeline for these parts, or None where only ldmfast has one."""
    if "unet" not in model.parts or not any(where.startswith("text_encoder") for where in model.parts):
        return None
    channels = model.parts["unet"].config["in_channels"]
    if "text_encoder_2" in model.parts:
        if "text_encoder" not in model.parts:
            return "StableDiffusionXLImg2ImgPipeline"
        return {4: "StableDiffusionXLPipeline", 9: "StableDiffusionXLInpaintPipeline"}.get(channels)
    kinds = {4: "", 9: "Inpaint", 8: "InstructPix2Pix", 5: "Depth2Img"}
    return f"StableDiffusion{kinds[channels]}Pipeline" if channels in kinds else None


def _pipeline_settings(model: Model) -> dict:
    vae, conditioner = model.parts.get("vae"), model.parts.get("conditioner")
    settings = {"autoencoder": vae and vae.config["_class_name"]}
    return {**settings, "conditioner": conditioner.config["_class_name"] if conditioner else "TextEncoder"}


def read_folder(folder: Path, variant: str | None = None) -> Model:
    """Read a diffusers folder: a pipeline's, or one network's. `missing` names what its parts should hold and do not.

    variant   of the weights, such as "fp16"; parts without it give their plain ones
    Raises ValueError for a part of another kind or a damaged file, FileNotFoundError for a folder that is neither.
    """
    if not (folder / "config.json").is_file() and not (folder / "unet" / "config.json").is_file():
        raise FileNotFoundError(f"{folder} is no diffusers folder: it has neither unet/config.json nor config.json")
    check_variant(folder, variant)
    alone = (folder / "config.json").is_file()
    record = files.read_json(folder / RECORD) if (folder / RECORD).is_file() else {}
    record = {"ema": False, "shapes": {}, "names": [], "legacy": True, **record}
    record["prefixes"] = record.get("prefixes") or _canonical_prefixes(folder, alone)
    rest = read_weights(folder / REST)[0] if (folder / REST).is_file() else {}
    model = Model(record["names"], {}, None, rest, record)
    names = [""] if alone else sorted(p.parent.name for p in folder.glob("*/config.json"))
    for where in names:
        _read_part(model, folder, where, variant)
    schedule = folder / "scheduler" / "scheduler_config.json"
    if not alone:
        if not schedule.is_file():
            raise FileNotFoundError(f"{folder} has no scheduler/scheduler_config.json: its noise schedule is not known")
        model.schedule = files.read_json(schedule)
    return model


def _canonical_prefixes(folder: Path, alone: bool) -> dict[str, str]:
    """Where the parts go in a released file, for a folder that did not come from one."""
    if alone:
        return {"": UNET if "UNet" in _config(folder).get("_class_name", "") else ""}
    places = {"unet": UNET, "vae": AUTOENCODER, "vqvae": AUTOENCODER, "conditioner": CONDITION}
    two, first = (folder / "text_encoder_2").is_dir(), folder / "text_encoder"
    if first.is_dir():
        if two:
            places["text_encoder"] = "conditioner.embedders.0.transformer."
        else:
            openclip = _config(first).get("hidden_act") == "gelu"
            places["text_encoder"] = CONDITION + ("model." if openclip else "transformer.")
    if two:
        places["text_encoder_2"] = f"conditioner.embedders.{1 if first.is_dir() else 0}.model."
    return {where: prefix for where, prefix in places.items() if (folder / where).is_dir()}


def _config(folder: Path) -> dict:
    return files.read_json(folder / "config.json")


def _read_part(model: Model, folder: Path, where: str, variant: str | None) -> None:
    """Add a part, or, where the released layout has no place for it, its tensors to the rest."""
    tensors, _ = part_weights(folder / where, variant)
    prefix = model.record["prefixes"].get(where)
    if prefix is None:
        model.rest |= {f"{CARRIED}{where}/{name}": value for name, value in tensors.items()}
        if tensors:
            model.notes.append(f"{len(tensors)} tensors of {where}, which the released layout has no place for")
        return
    if where in _NETWORKS:
        tensors = {_modern(name): value for name, value in tensors.items()}
    elif where.startswith("text_encoder"):
        tensors = {_BARE.sub(r"text_model.\1", name): value for name, value in tensors.items()}
    part = _empty_part(folder / where, where, prefix, model.record)
    wanted = {key for entry in part.entries for key in entry.keys}
    strays = sorted(set(tensors) - wanted)
    if strays:
        model.notes.append(f"{len(strays)} tensors in {where} (unknown to its class: {', '.join(strays[:3])})")
    model.rest |= {f"{CARRIED}{where}/{name}": tensors.pop(name) for name in strays}
    for key, shape in (part.shapes or {}).items():
        if key in tensors and tuple(tensors[key].shape) != shape:
            raise ValueError(f"{folder / where}: {key} has shape {tuple(tensors[key].shape)}, its config says {shape}")
    part.tensors = tensors
    model.missing += sorted(f"{where}.{name}".removeprefix(".") for name in wanted - set(tensors))
    model.parts[where] = part


def _empty_part(folder: Path, where: str, prefix: str, record: dict) -> Part:
    try:
        return part_of(_config(folder), where, prefix, record)
    except KeyError as error:
        raise ValueError(f"{folder / 'config.json'} lacks {error.args[0]}") from error
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder / 'config.json'} could not be used: {files.first_line(error)}") from error


def _modern(name: str) -> str:
    """An attention block's tensor by today's name: folders of 2022, Stable Diffusion 1's among them, have others."""
    return re.sub(
        r"(\.attentions\.\d+)\.(query|key|value|proj_attn)\.", lambda m: f"{m[1]}.{_OLD_ATTENTION[m[2]]}.", name
    )


def part_of(config: dict, where: str, prefix: str, record: dict) -> Part:
    """The part of a folder, with the table that leads to a released file."""
    if where == "unet" or "UNet" in config.get("_class_name", ""):
        return unet_part(config, prefix, record["legacy"])
    if where in _NETWORKS:
        return autoencoder_part(config, prefix)
    if where.startswith("text_encoder"):
        layout = "openclip" if prefix.endswith("model.") else "clip"
        return text_part(config, layout, prefix)
    return conditioner_part(config)
