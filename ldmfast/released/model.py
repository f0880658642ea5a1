"""`Model`: a latent diffusion model as parts, each with its configuration, its tensors, and their released names."""

from __future__ import annotations

import dataclasses
import functools
import json
from dataclasses import dataclass, field

import torch

from ldmfast.diffusion import catalogue
from ldmfast.released import keys_text
from ldmfast.released.conditioner_parts import conditioner_entries, make_conditioner
from ldmfast.released.keys import Entry, autoencoder_entries, unet_entries

UNET, AUTOENCODER, CONDITION = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."


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

    @property
    def dtype(self) -> torch.dtype:
        """The tensors' floating type; where they have several, or one for storage alone, one that holds them all."""
        found = {value.dtype for value in self.tensors.values() if value.is_floating_point()}
        wide = [dtype for dtype in found if dtype.itemsize > 1]  # no network computes in float8
        return functools.reduce(torch.promote_types, wide) if wide else torch.float32


@dataclass
class Model:
    """names  rows of families.py that it may be;  schedule  a scheduler's configuration;  rest  other tensors

    guesses   what neither the source nor its family says, and was guessed, with the option that settles it
    """

    names: list[str]
    parts: dict[str, Part]
    schedule: dict | None
    rest: dict[str, torch.Tensor]
    record: dict = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    guesses: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def unet_part(config: dict, prefix: str = UNET, legacy: bool = True) -> Part:
    shapes, full = class_shapes(config)
    return Part(config, _prefixed(prefix, unet_entries(shapes, full, legacy=legacy)), shapes=shapes)


def autoencoder_part(config: dict, prefix: str = "") -> Part:
    shapes, full = class_shapes(config)
    return Part(config, _prefixed(prefix, autoencoder_entries(shapes, full)), shapes=shapes)


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


def class_shapes(config: dict) -> tuple[dict[str, tuple], dict]:
    """({name: shape} of a network, without its memory; its configuration with the defaults of its class)"""
    return _class_shapes(json.dumps(config, sort_keys=True))


@functools.lru_cache(maxsize=16)
def _class_shapes(text: str) -> tuple[dict[str, tuple], dict]:
    config = json.loads(text)
    with torch.device("meta"):
        model = catalogue.network(config.get("_class_name")).from_config(config)
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}, dict(model.config)
