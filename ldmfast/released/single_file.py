"""A `Model` (model.py) as a single file in the released layout, and back.

`from_released` takes a file's tensors apart, `to_released` puts them together again; nothing is lost: what has no place
in a part is the `rest`. Where a configuration does not follow from the shapes it comes from the family (families.py),
or from the original YAML.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ldmfast.models.weight_files import kind
from ldmfast.released import infer, keys_text
from ldmfast.released.conditioner_parts import conditioner_config
from ldmfast.released.families import DENOISERS, recognise, recognise_autoencoder
from ldmfast.released.keys import Entry
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
from ldmfast.released.settings import heads_rule, read_config, scale_factor, schedule, unet_settings

# what a released file holds beside the model, and what that is
_KNOWN_REST = {
    "model_ema.": "averaged weights (ema=True takes them)",
    "loss.": "the autoencoder's discriminator and perceptual network",
    "first_stage_model.loss.": "the autoencoder's discriminator and perceptual network",
    "cond_stage_model.": "parts of the encoder that the model does not read",
    "conditioner.embedders.": "parts of the encoders that the model does not read",
    "ldmfast.": "parts without a place in the released layout",
}
_SCHEDULE = (
    "betas",
    "alphas_cumprod",
    "sqrt_",
    "log_one_minus",
    "posterior_",
    "scale_factor",
    "logvar",
    "lvlb_weights",
)


def ema_name(name: str) -> str:
    """Where the averaged copy of a released tensor is: buffers' names have no dots."""
    return "model_ema." + name.removeprefix("model.").replace(".", "")


def from_released(
    tensors: dict[str, torch.Tensor],
    config: dict | str | Path | None = None,
    *,
    ema: bool = False,
    header: dict[str, Any] | None = None,
) -> Model:
    """Take a released checkpoint apart.

    config  the original YAML (a path, or its content), where it is given
    ema     the averaged weights of the denoiser in place of the plain ones
    header  what convert wrote beside the tensors of a folder: {"configs": {place: text}, "legacy": bool}
    Raises ValueError: another kind of file, a family that is not known, shapes that do not fit. `missing` names what
    the file should hold and does not.
    """
    table = {name: tuple(value.shape) for name, value in tensors.items()}
    settings, header = read_config(config), header or {}
    known = {name: json.loads(text) for name, text in header.get("configs", {}).items()}
    try:
        model = _empty_model(table, tensors, settings, known, header.get("legacy"))
    except KeyError as error:
        raise ValueError(f"lacks {error.args[0]}, without which the model's shape is not known") from error
    model.record["configs"] = header.get("configs", {})
    _fill(model, dict(tensors), ema)
    return model


def _empty_model(table: dict, tensors: dict, settings: dict, known: dict, legacy: bool | None) -> Model:
    """The parts that a file's names show, without their tensors."""
    if "encoder.down.0.block.0.conv1.weight" in table:
        return _autoencoder_alone(table, settings, known)
    if UNET + "input_blocks.0.0.weight" in table:
        return _whole(table, tensors, settings, known, legacy)
    raise ValueError(f"no latent diffusion model in the released layout: this is {kind(_without_prefix(table))}")


def _without_prefix(table: dict) -> dict:
    return {name.removeprefix(UNET): shape for name, shape in table.items()}


def _autoencoder_alone(table: dict, settings: dict, known: dict) -> Model:
    found, more = infer.autoencoder_structure(table)
    name = recognise_autoencoder(found)
    scale = settings.get("scale_factor", 0.18215 if name == "kl-f8" else 1.0)
    config = known.get("config.json") or infer.autoencoder_config(found, more, scale, 256)
    return Model([name] if name else [], {"": autoencoder_part(config)}, None, {}, {"prefixes": {"": ""}})


def _whole(table: dict, tensors: dict, settings: dict, known: dict, legacy: bool | None) -> Model:
    """The parts of a file with a denoiser, still empty.   known  configurations that the file brings along"""
    encoders, conditions = keys_text.places(table)
    structure = infer.unet_structure(_under(table, UNET))
    names = [n for c in (conditions or {None}) for n in recognise(structure, c)]
    row = DENOISERS[names[0]] if names else None
    if legacy is None:
        legacy = not unet_settings(settings).get("use_new_attention_order", False)
    side = settings.get("image_size", row.sample_size if row else 64)
    config = known.get("unet/config.json") or infer.unet_config(structure, heads_rule(structure, names, settings), side)
    model = Model(names, {"unet": unet_part(config, UNET, legacy)}, None, {}, {"legacy": legacy})
    model.record["prefixes"] = {"unet": UNET}
    if stage := _under(table, AUTOENCODER):
        where = "vqvae" if "vqvae/config.json" in known else "vae"  # as diffusers' LDMPipeline names it
        config = known.get(f"{where}/config.json") or _autoencoder_config(
            stage, scale_factor(tensors, settings, row), side
        )
        model.parts[where] = autoencoder_part(config, AUTOENCODER)
        model.record["prefixes"][where] = AUTOENCODER
    _add_encoders(model, table, encoders, settings, known)
    model.schedule = known.get("scheduler/scheduler_config.json") or schedule(tensors, settings, row)
    return model


def _under(table: dict, prefix: str) -> dict:
    return {name.removeprefix(prefix): shape for name, shape in table.items() if name.startswith(prefix)}


def _autoencoder_config(table: dict, scale: float, latent: int) -> dict:
    found, more = infer.autoencoder_structure(table)
    return infer.autoencoder_config(found, more, scale, latent * 2 ** (len(found.mult) - 1))


def _add_encoders(model: Model, table: dict, encoders: list, settings: dict, known: dict) -> None:
    """The text towers, or the conditioner."""
    unet = model.parts["unet"].config
    joined = unet["in_channels"] - unet["out_channels"]
    for place in encoders:
        brought = known.get(f"{place.part}/config.json")
        if place.layout in ("clip", "openclip"):
            config = brought or keys_text.clip_config(table, place)
            model.parts[place.part] = text_part(config, place.layout, place.prefix)
        else:
            config = brought or conditioner_config(_under(table, place.prefix), model.names, settings, joined)
            model.parts[place.part] = conditioner_part(config)
        model.record["prefixes"][place.part] = place.prefix
    if not encoders and ("conditioner/config.json" in known or not known):
        config = known.get("conditioner/config.json") or conditioner_config({}, model.names, settings, joined)
        model.parts["conditioner"] = conditioner_part(config)
        model.record["prefixes"]["conditioner"] = CONDITION


def _fill(model: Model, tensors: dict[str, torch.Tensor], ema: bool) -> None:
    """Move the tensors into the parts; what is left is the rest. Raises ValueError for shapes that do not fit."""
    if ema and not any(name.startswith("model_ema.diffusion_model") for name in tensors):
        raise ValueError("ema=True, but the file holds no averaged weights (model_ema.)")
    model.record |= {"ema": ema, "names": model.names, "shapes": {}}
    for where, part in model.parts.items():
        for entry in part.entries:
            source = ema_name(entry.released) if ema and where == "unet" else entry.released
            if source not in tensors:
                model.missing.append(source)
                continue
            value = tensors.pop(source)
            if entry.ndim is not None and value.ndim not in (1, entry.ndim):
                model.record["shapes"][source] = list(value.shape)
            _place(part, entry, source, value)
    model.rest = tensors
    model.notes += rest_notes(tensors, {UNET: "the plain weights of the denoiser"} if ema else {})


def _place(part: Part, entry: Entry, source: str, value: torch.Tensor) -> None:
    try:
        values = entry.apply(value)
    except RuntimeError as error:
        raise ValueError(f"{source} has shape {tuple(value.shape)}, which its place does not take") from error
    for key, each in zip(entry.keys, values, strict=True):
        if part.shapes is not None and tuple(each.shape) != part.shapes[key]:
            raise ValueError(f"{source} has shape {tuple(value.shape)}; {key} is {part.shapes[key]}")
        part.tensors[key] = each


def rest_notes(rest: dict, expected: dict[str, str]) -> list[str]:
    """A sentence for each kind of tensor without a place; those of no kind are named.   expected  {prefix: what}"""
    known = _KNOWN_REST | expected
    counts: dict[str, list[str]] = {}
    for name in rest:
        what = next((text for prefix, text in known.items() if name.startswith(prefix)), None)
        what = "the noise schedule" if what is None and name.startswith(_SCHEDULE) else what
        counts.setdefault(what or "unknown", []).append(name)
    notes = []
    for what, names in counts.items():
        shown = f": {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}" if what == "unknown" else ""
        notes.append(f"{len(names)} tensors beside the model ({what}{shown})")
    return notes


def to_released(model: Model) -> dict[str, torch.Tensor]:
    """The parts put together again as a single file's tensors. Raises ValueError if two claim one name."""
    tensors = dict(model.rest)
    ema, shapes = model.record.get("ema", False), model.record.get("shapes", {})
    for where, part in model.parts.items():
        for entry in part.entries:
            name = ema_name(entry.released) if ema and where == "unet" else entry.released
            values = [part.tensors[key] for key in entry.keys if key in part.tensors]
            if len(values) < len(entry.keys):
                model.missing.append(f"{where}: {', '.join(key for key in entry.keys if key not in part.tensors)}")
                continue
            if name in tensors:
                raise ValueError(f"{name} is both a tensor of {where} and one beside the model")
            value = entry.undo(values)
            tensors[name] = value.view(shapes[name]) if name in shapes else value
    return tensors
