"""A LoRA file as changes of layers, by network."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from ldmfast.files import read_json
from ldmfast.models.weight_files import WIDTHS
from ldmfast.released.lora.lora_matrices import Change, change
from ldmfast.released.lora.lora_names import TEXT, UNET, Key, find, layer_names, layers, other_kind, parse
from ldmfast.released.weights import read_weights

IN_A_FOLDER = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin", "adapter_model.safetensors")
_NORMS = (nn.GroupNorm, nn.LayerNorm)


def lora_path(path: str | Path) -> Path:
    """The file that `path` is, or that a folder holds under a usual name. Raises FileNotFoundError."""
    path = Path(path)
    if path.is_dir():
        path = next((path / name for name in IN_A_FOLDER if (path / name).is_file()), path / IN_A_FOLDER[0])
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no LoRA file")
    return path


def read_lora(path: Path, networks: dict[str, nn.Module]) -> tuple[dict[str, dict[str, Change]], list[str]]:
    """({network: {layer: its change}}, notes) of a LoRA file, for live networks: unet, text_encoder, text_encoder_2.

    notes  what of the file has no place in them, a clause each
    Raises ValueError in one sentence: no LoRA, a method that is no sum of matrices (by its name), another network's.
    """
    tensors, others = read_weights(path)
    found = _by_layer(path, tensors)
    modules = {part: layers(network) for part, network in networks.items()}
    names = {part: layer_names(part, network, modules[part]) for part, network in networks.items()}
    scale_of = _scales(path, others)
    changes: dict[str, dict[str, Change]] = {}
    absent: dict[str, int] = {}
    for (parts, layer), own in found.items():
        part, name = _place(parts, layer, names)
        if name is None:
            if not any(part in networks for part in parts):
                absent[parts[0]] = absent.get(parts[0], 0) + 1
                continue
            raise ValueError(_misfit(path, tensors, f"it changes {layer!r}, which is no layer of it", parts[0]))
        try:
            changes.setdefault(part, {})[name] = _checked(modules[part][name], own, scale_of(part, name))
        except ValueError as error:
            raise ValueError(_misfit(path, tensors, f"{layer} {error}", part)) from error
    return changes, [f"{count} layers of {part}" for part, count in absent.items()]


def _by_layer(path: Path, tensors: dict) -> dict[tuple, dict[str, torch.Tensor]]:
    """{(networks, layer as written): {role: tensor}}. Raises ValueError for a file of another kind."""
    if kind := other_kind(list(tensors)):
        what = "LoRA, LoHa, LoKr, DoRA and differences of weights"
        raise ValueError(f"{path}: its method is {kind}, which is no matrix added to a weight; taken are {what}")
    layers: dict[tuple, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        key: Key | None = parse(name)
        if key is None and not layers:
            raise ValueError(f"{path} holds no LoRA of a U-Net: its first key is {name!r:.80}")
        if key is None:
            raise ValueError(f"{path} is a LoRA with a key that is not known: {name!r:.80}")
        layers.setdefault((key.parts, key.layer), {})[key.role] = value
    if not layers:
        raise ValueError(f"{path} holds no LoRA of a U-Net: its first key is missing")
    return layers


def _place(parts, layer, names) -> tuple[str, str | None]:
    for part in parts:
        if part in names and (name := find(layer, names[part])):
            return part, name
    return parts[0], None


def _checked(module: nn.Module, own: dict, scale: float | None) -> Change:
    weight = getattr(module, "weight", None)
    if weight is None:
        raise ValueError("is a layer without a weight")
    if isinstance(module, _NORMS):  # LyCORIS' whole differences name them as any other layer's
        own = {{"diff": "norm_weight", "bias": "norm_bias"}.get(role, role): value for role, value in own.items()}
        own.pop("alpha", None)
    return change(own, weight.shape, scale)


def _misfit(path: Path, tensors: dict, why: str, part: str) -> str:
    what = "U-Net" if part == UNET else "text encoder"
    made = _family(tensors)
    return f"{path} does not fit this {what}: {why}" + (
        f"; the file is made for {made}" if made and part == UNET else ""
    )


def _family(tensors: dict) -> str | None:
    """The family whose prompt's width a file's cross-attention has."""
    for name, value in tensors.items():
        if re.search(r"attn2[._](processor\.)?to_k.*(lora_down|lora_A|lora\.down)", name) and value.ndim > 1:
            return WIDTHS.get(value.shape[1])
    return None


def _scales(path: Path, others: dict) -> Callable[[str, str], float | None]:
    """(network, layer) -> alpha / rank as the file's metadata, or peft's adapter_config.json beside it, have it."""
    settings = {}
    if "lora_adapter_metadata" in others:  # diffusers': one table, each name with its network's before it
        for name, value in json.loads(others["lora_adapter_metadata"]).items():
            part, _, key = name.partition(".")
            settings.setdefault(part, {})[key] = value
    elif (path.parent / "adapter_config.json").is_file() and path.name == "adapter_model.safetensors":
        settings = dict.fromkeys((UNET, TEXT), read_json(path.parent / "adapter_config.json"))

    def scale(part: str, layer: str) -> float | None:
        own = settings.get(part, {})
        if not own.get("lora_alpha"):
            return None
        rank, alpha = (
            next(
                (value for key, value in (own.get(f"{name}_pattern") or {}).items() if _ends(key, layer)), own[default]
            )
            for name, default in (("rank", "r"), ("alpha", "lora_alpha"))
        )
        return alpha / (rank**0.5 if own.get("use_rslora") else rank)

    return scale


def _ends(pattern: str, layer: str) -> bool:
    """peft's rule: a pattern names the layers whose names end in it."""
    return re.match(rf"(.*\.)?({pattern})$", layer) is not None
