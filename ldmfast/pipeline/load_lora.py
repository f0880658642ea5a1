"""`load_lora`: LoRA files on a pipeline, ours or diffusers', as people have them.

Every file becomes a low-rank pair for each layer (released/lora) and an adapter of peft's, put on by diffusers' and
transformers' own loaders. So diffusers' methods see it as one of theirs (set_adapters, fuse_lora, unload_lora_weights),
and nothing is merged that could be stale.
"""

from __future__ import annotations

import functools
import hashlib
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import diffusers
from torch import nn

from ldmfast.files import first_line
from ldmfast.models.lora import require_peft
from ldmfast.pipeline.lora_adapter import PREFIX, attach
from ldmfast.pipeline.lora_layers import table_of
from ldmfast.released.lora.lora_file import lora_path, read_lora
from ldmfast.released.lora.lora_names import TEXT, TEXT_2, UNET

Lora = str | Path | tuple[str | Path, float]


def load_lora(target: Any, *files: Lora) -> None:
    """From now on `target` has these LoRAs and no others, each a path or (path, scale); none takes all of them off.

    target  a LatentDiffusionPipeline, a pipeline of diffusers', or a U-Net
    path    a file, or a folder that holds one: kohya's or LyCORIS' (LoRA, LoCon, LoHa, LoKr, whole differences, norms
            and biases, DoRA), diffusers' old and new, peft's; .safetensors, or a pickle of tensors
    Files that were loaded before and have not changed stay in memory beside the network, so that going back to one is a
    matter of milliseconds; `load_lora(target)` frees them.
    Raises FileNotFoundError; ValueError for a file that is no LoRA, or none of this network's shape, or one of a method
    that is no matrix added to a weight (GLoRA, OFT, ...), by its name; ImportError without peft. The LoRAs are as they
    were then.
    """
    require_peft()
    networks = _networks(target)
    if not files:
        _unload(networks)
        return
    asked = [(file, 1.0) if isinstance(file, str | os.PathLike) else file for file in files]
    before = {part: _held(network) for part, network in networks.items()}
    names = []
    try:
        for file, _ in asked:
            names.append(_load(lora_path(file), networks))
    except BaseException:
        for part, network in networks.items():
            _delete(network, [name for name in _held(network) if name not in before[part]])
        _unload({part: network for part, network in networks.items() if not before[part]})
        raise
    scales = {}
    for name, (_, scale) in zip(names, asked, strict=True):
        scales[name] = scales.get(name, 0.0) + float(scale)  # one file given twice
    for network in networks.values():
        _activate(network, scales)


def as_list(lora: Lora | Iterable[Lora] | None) -> list[Lora]:
    """What an option `lora=` may be, as the files of `load_lora`: nothing, one file, (file, scale), or several."""
    if lora is None:
        return []
    single = isinstance(lora, str | os.PathLike)
    pair = isinstance(lora, tuple) and len(lora) == 2 and isinstance(lora[1], int | float)
    return [lora] if single or pair else list(lora)


def _networks(target: Any) -> dict[str, nn.Module]:
    """{unet, text_encoder, text_encoder_2} as far as `target` has them."""
    if isinstance(target, diffusers.DiffusionPipeline):
        found = {part: getattr(target, part, None) for part in (UNET, TEXT, TEXT_2)}
    elif isinstance(target, nn.Module):
        found = {UNET: target}
    else:
        towers = [module for module in target.conditioner.modules() if _is_clip(module)]
        found = {UNET: target.unet, **dict(zip((TEXT, TEXT_2), towers, strict=False))}
    found = {part: network for part, network in found.items() if network is not None}
    if not hasattr(found.get(UNET), "load_lora_adapter"):
        raise ValueError(f"a {type(found.get(UNET, target)).__name__} takes no LoRA; a UNet does")
    return found


def _is_clip(module: nn.Module) -> bool:
    return type(module).__name__ in ("CLIPTextModel", "CLIPTextModelWithProjection")


def _held(network: nn.Module) -> list[str]:
    return list(getattr(network, "peft_config", None) or {})


def _load(path: Path, networks: dict[str, nn.Module]) -> str:
    """Put a file on the networks, unless it is there; its adapter's name."""
    state = path.stat()
    written = f"{path.resolve()} {state.st_mtime_ns} {state.st_size} {state.st_ino}"
    name = f"{PREFIX}{hashlib.sha256(written.encode()).hexdigest()[:16]}"
    if any(name in _held(network) for network in networks.values()):
        return name
    changes, notes = read_lora(path, networks)
    if not changes:
        raise ValueError(f"{path} holds no LoRA of these networks: it changes {' and '.join(notes)}")
    if notes:
        warnings.warn(f"{path}: {' and '.join(notes)} are left out; there is no such network here", stacklevel=4)
    for part, of_layers in changes.items():
        try:
            attach(networks[part], part, of_layers, name)
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{path} does not fit this {part}: {first_line(error)}") from error
    return name


def _activate(network: nn.Module, scales: dict[str, float]) -> None:
    """Exactly these adapters, of those that this network has: none fused, none switched off."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = functools.cache(lambda kind: issubclass(kind, BaseTunerLayer))  # an abstract class: isinstance is slow
    names, waiting = [name for name in scales if name in _held(network)], [network]
    while waiting:  # as network.modules(), which takes longer than the rest
        layer = waiting.pop()
        waiting += [child for child in layer._modules.values() if child is not None]
        if adapted(type(layer)):
            if layer.merged:
                layer.unmerge()
            if layer.disable_adapters:
                layer.enable_adapters(True)
            _switch(layer, names)
            for name in names:
                layer.set_scale(name, scales[name])


def _switch(layer: nn.Module, names: list[str]) -> None:
    """As peft's layer.set_adapter(names), whose time grows with every adapter that is held."""
    concerned = {*layer.active_adapters, *names}
    for attribute in layer.adapter_layer_names:
        table = table_of(layer, attribute)
        for name in concerned if table else ():
            if name in table:
                _require_grad(table[name], name in names)
    layer._active_adapter = names


def _require_grad(part: nn.Module | nn.Parameter, required: bool) -> None:
    """part.requires_grad_(required); a layer's own looks for children and takes longer."""
    alone = isinstance(part, nn.Module) and not part._modules
    for owned in part._parameters.values() if alone else (part,):
        if owned is not None:
            owned.requires_grad_(required)


def _delete(network: nn.Module, names: list[str]) -> None:
    from diffusers.utils import delete_adapter_layers

    for name in names:
        if isinstance(network, diffusers.ModelMixin):
            network.delete_adapters(name)
        else:
            delete_adapter_layers(network, name)


def _unload(networks: dict[str, nn.Module]) -> None:
    from diffusers.loaders.lora_base import _remove_text_encoder_monkey_patch
    from peft.tuners.tuners_utils import BaseTunerLayer

    for network in networks.values():
        if not any(isinstance(module, BaseTunerLayer) for module in network.modules()):
            continue
        if isinstance(network, diffusers.ModelMixin):
            network.unload_lora()
        else:
            _remove_text_encoder_monkey_patch(network)
