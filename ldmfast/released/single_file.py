"""A single file in the released layout as a `Model` (model.py): what parts it has, and their configurations.

Where a configuration does not follow from the shapes it comes from the original YAML, from what the file says of itself
(noise_schedule.py), or from the family (families.py). parts.py fills the parts, and goes back.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ldmfast.models.weight_files import kind
from ldmfast.released import infer, keys_text
from ldmfast.released.conditioner_parts import conditioner_config
from ldmfast.released.families import DENOISERS, Denoiser, recognise, recognise_autoencoder
from ldmfast.released.model import (
    AUTOENCODER,
    CONDITION,
    UNET,
    Model,
    autoencoder_part,
    conditioner_part,
    text_part,
    unet_part,
)
from ldmfast.released.noise_schedule import schedule
from ldmfast.released.parts import fill, with_averaged
from ldmfast.released.settings import heads_rule, number, read_config, scale_factor, unet_settings
from ldmfast.released.spellings import AVERAGED, usual_names


def from_released(
    tensors: dict[str, torch.Tensor],
    config: dict | str | Path | None = None,
    *,
    ema: bool = False,
    header: dict[str, Any] | None = None,
    said: dict[str, Any] | None = None,
) -> Model:
    """Take a released checkpoint apart.

    config  the original YAML (a path, its text or content), where it is given
    ema     the averaged weights of the denoiser in place of the plain ones
    header  what convert wrote beside the tensors of a folder: {"configs": {place: text}, "legacy": bool}
    said    what else the file holds beside its tensors: metadata, numbers
    Raises ValueError: another kind of file, a family that is not known, shapes that do not fit. `missing` names what
    the file should hold and does not.
    """
    tensors, notes = usual_names(tensors)
    table = {name: tuple(value.shape) for name, value in with_averaged(tensors, ema).items()}
    settings, header = read_config(config), header or {}
    known = {name: json.loads(text) for name, text in header.get("configs", {}).items()}
    file = _File(table, tensors, settings, known, said or {}, header.get("legacy"))
    try:
        model = _empty_model(file)
    except KeyError as error:
        raise ValueError(f"lacks {error.args[0]}, without which the model's shape is not known") from error
    model.record["configs"] = header.get("configs", {})
    model.notes += notes
    fill(model, dict(tensors), ema)
    return model


@dataclass(frozen=True)
class _File:
    """What is known of a file.   settings  the original configuration's;   known  those that it brings along"""

    table: dict[str, tuple[int, ...]]
    tensors: dict[str, torch.Tensor]
    settings: dict
    known: dict[str, dict]
    said: dict[str, Any]
    legacy: bool | None


def _empty_model(file: _File) -> Model:
    """The parts that a file's names show, without their tensors."""
    if "encoder.down.0.block.0.conv1.weight" in file.table:
        return _autoencoder_alone(file)
    if UNET + "input_blocks.0.0.weight" in file.table:
        return _whole(file)
    if any(name.startswith(AVERAGED) for name in file.table):
        raise ValueError("holds the averaged weights of a denoiser alone (model_ema.); ema=True (--ema) takes them")
    found = kind({name.removeprefix(UNET): shape for name, shape in file.table.items()})
    raise ValueError(f"no latent diffusion model in the released layout: this is {found}")


def _autoencoder_alone(file: _File) -> Model:
    found, more = infer.autoencoder_structure(file.table)
    name = recognise_autoencoder(found)
    scale = number(file.settings, "scale_factor", 0.18215 if name == "kl-f8" else 1.0)
    config = file.known.get("config.json") or infer.autoencoder_config(found, more, scale, 256)
    return Model([name] if name else [], {"": autoencoder_part(config)}, None, {}, {"prefixes": {"": ""}})


def _whole(file: _File) -> Model:
    """The parts of a file with a denoiser, still empty."""
    table, settings, known = file.table, file.settings, file.known
    encoders, conditions = keys_text.places(table)
    structure = infer.unet_structure(_under(table, UNET))
    names = [n for c in (conditions or {None}) for n in recognise(structure, c)]
    row = DENOISERS[names[0]] if names else None
    legacy = file.legacy
    if legacy is None:
        legacy = not unet_settings(settings).get("use_new_attention_order", False)
    brought = known.get("unet/config.json")
    heads = None if brought else heads_rule(structure, names, settings)
    steps, guess = schedule(file.tensors, settings, row, file.said, known.get("scheduler/scheduler_config.json"))
    side = settings.get("image_size", _trained_size(row, steps))
    config = brought or infer.unet_config(structure, heads, side)
    model = Model(names, {"unet": unet_part(config, UNET, legacy)}, steps, {}, {"legacy": legacy})
    model.guesses += [guess] if guess else []
    model.record["prefixes"] = {"unet": UNET}
    if stage := _under(table, AUTOENCODER):
        where = "vqvae" if "vqvae/config.json" in known else "vae"  # as diffusers' LDMPipeline names it
        scale = scale_factor(file.tensors, settings, row)
        config = known.get(f"{where}/config.json") or _autoencoder_config(stage, scale, side)
        model.parts[where] = autoencoder_part(config, AUTOENCODER)
        model.record["prefixes"][where] = AUTOENCODER
    _add_encoders(model, table, encoders, settings, known)
    return model


def _trained_size(row: Denoiser | None, steps: dict) -> int:
    """Of the latents: Stable Diffusion 2 in v was trained on 96x96, in epsilon on 64x64."""
    if row is None or row.sample_size == 96 and steps.get("prediction_type") == "epsilon":
        return 64
    return row.sample_size


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
