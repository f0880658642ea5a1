"""A model as parts: diffusers' configurations and tensors, and how each goes back into the released layout.

`from_released` takes a single file's tensors apart, `to_released` puts them together again; nothing is lost: what has
no place in a part is the `rest`. Where a configuration does not follow from the shapes it comes from the family
(families.py), or from the original YAML.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from dataclasses import dataclass, field

import torch

from ldmfast.models.weight_files import kind
from ldmfast.released import infer, keys_text
from ldmfast.released.conditioner_parts import conditioner_config, conditioner_entries, make_conditioner
from ldmfast.released.families import DENOISERS, recognise, recognise_first_stage
from ldmfast.released.keys import Entry, first_stage_entries, unet_entries
from ldmfast.released.settings import heads_rule, read_config, scale_factor, schedule, unet_settings

UNET, FIRST_STAGE, CONDITION = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
# what a released file holds beside the model, and what that is
_KNOWN_REST = {
    "model_ema.": "averaged weights (ema=True takes them)",
    "loss.": "the first stage's discriminator and perceptual network",
    "first_stage_model.loss.": "the first stage's discriminator and perceptual network",
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


@dataclass
class Part:
    """One network.   config  its config.json;   entries  the released tensors that it is made of, their names whole"""

    config: dict
    entries: list[Entry]
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    shapes: dict[str, tuple] | None = None  # what its class expects

    @property
    def complete(self) -> bool:
        """Whether no tensor is missing."""
        return all(key in self.tensors for entry in self.entries for key in entry.keys)


@dataclass
class Model:
    """names  rows of families.py that it may be;  schedule  a DDIMScheduler's configuration;  rest  other tensors"""

    names: list[str]
    parts: dict[str, Part]
    schedule: dict | None
    rest: dict[str, torch.Tensor]
    record: dict = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def ema_name(name: str) -> str:
    """Where the averaged copy of a released tensor is: buffers' names have no dots."""
    return "model_ema." + name.removeprefix("model.").replace(".", "")


def from_released(tensors: dict[str, torch.Tensor], config=None, *, ema: bool = False, header=None) -> Model:
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
        return _first_stage_alone(table, settings, known)
    if UNET + "input_blocks.0.0.weight" in table:
        return _whole(table, tensors, settings, known, legacy)
    raise ValueError(f"no latent diffusion model in the released layout: this is {kind(_without_prefix(table))}")


def _without_prefix(table: dict) -> dict:
    return {name.removeprefix(UNET): shape for name, shape in table.items()}


def _first_stage_alone(table: dict, settings: dict, known: dict) -> Model:
    found, more = infer.first_stage_structure(table)
    name = recognise_first_stage(found)
    scale = settings.get("scale_factor", 0.18215 if name == "kl-f8" else 1.0)
    config = known.get("config.json") or infer.first_stage_config(found, more, scale, 256)
    return Model([name] if name else [], {"": first_stage_part(config)}, None, {}, {"prefixes": {"": ""}})


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
    if stage := _under(table, FIRST_STAGE):
        where = "vqvae" if "vqvae/config.json" in known else "vae"  # as diffusers' LDMPipeline names it
        config = known.get(f"{where}/config.json") or _first_stage_config(
            stage, scale_factor(tensors, settings, row), side
        )
        model.parts[where] = first_stage_part(config, FIRST_STAGE)
        model.record["prefixes"][where] = FIRST_STAGE
    _add_encoders(model, table, encoders, settings, known)
    model.schedule = known.get("scheduler/scheduler_config.json") or schedule(tensors, settings, row)
    return model


def _under(table: dict, prefix: str) -> dict:
    return {name.removeprefix(prefix): shape for name, shape in table.items() if name.startswith(prefix)}


def _first_stage_config(table: dict, scale: float, latent: int) -> dict:
    found, more = infer.first_stage_structure(table)
    return infer.first_stage_config(found, more, scale, latent * 2 ** (len(found.mult) - 1))


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


def unet_part(config: dict, prefix: str = UNET, legacy: bool = True) -> Part:
    shapes, full = class_shapes(config)
    return Part(config, _prefixed(prefix, unet_entries(shapes, full, legacy=legacy)), shapes=shapes)


def first_stage_part(config: dict, prefix: str = "") -> Part:
    shapes, full = class_shapes(config)
    return Part(config, _prefixed(prefix, first_stage_entries(shapes, full)), shapes=shapes)


def conditioner_part(config: dict) -> Part:
    if config["_class_name"] == "TextEncoder":  # known by its name; its weights are not the model's
        return Part(config, [])
    with torch.device("meta"):
        weights = make_conditioner(config).own_weights()
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    return Part(config, _prefixed(CONDITION, conditioner_entries(shapes)), shapes=shapes)


def text_part(config: dict, layout: str, prefix: str) -> Part:
    return Part(config, _prefixed(prefix, keys_text.clip_entries(config, layout)))


def _prefixed(prefix: str, entries: list[Entry]) -> list[Entry]:
    return [dataclasses.replace(e, released=prefix + e.released) for e in entries]


def network_class(config: dict) -> type:
    """ldmfast's class for a config.json of diffusers."""
    import ldmfast.models as ours
    from ldmfast.models.vq import VQModel

    classes = {
        "UNet2DConditionModel": ours.UNet,
        "UNet2DModel": ours.UNet2D,
        "AutoencoderKL": ours.AutoencoderKL,
        "VQModel": VQModel,
    }
    name = config.get("_class_name")
    if name not in classes:
        raise ValueError(f"a {name} has no place in a latent diffusion model; expected one of {', '.join(classes)}")
    return classes[name]


def class_shapes(config: dict) -> tuple[dict[str, tuple], dict]:
    """({name: shape} of a network, without its memory; its configuration with the defaults of its class)"""
    return _class_shapes(json.dumps(config, sort_keys=True))


@functools.lru_cache(maxsize=16)
def _class_shapes(text: str) -> tuple[dict[str, tuple], dict]:
    config = json.loads(text)
    with torch.device("meta"):
        model = network_class(config).from_config(config)
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}, dict(model.config)


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
    """Put the parts together again as a single file's tensors. Raises ValueError if two claim one name."""
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


def record_text(record: dict) -> str:
    return json.dumps({"format": 1, **record}, indent=2, sort_keys=True) + "\n"
