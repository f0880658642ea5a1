"""peft's layers around a network's linear layers and convolutions, for a first LoRA file.

peft looks for the layers of an adapter through the whole network, and makes each by itself with random matrices: 0.2 s
of a U-Net of Stable Diffusion 1. Here it makes one of each kind, and the others are made like that one.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import nn

_BASES = (nn.Linear, nn.Conv2d)
_TABLES = (OrderedDict, dict, list, set)


def wrap(network: nn.Module, layers: list[str], config: Any, name: str) -> dict[str, nn.Module] | None:
    """Put peft's layers, with an adapter of that name and rank 1, in place of a network's; {name: layer of peft's}.

    config  peft's configuration of that adapter, as the network then has it; its other weights take no gradients
    None, with nothing done, for a network that has adapters, and where a layer is more than its class or is elsewhere:
    offloaded, quantised, sharded, with hooks.
    """
    bases = {layer: find(network, layer) for layer in layers}
    hotswap = getattr(network, "_prepare_lora_hotswap_kwargs", None)  # diffusers prepares what it has put on itself
    if hotswap is not None or getattr(network, "peft_config", None) or offloaded(network):
        return None
    if not all(map(_is_bare, bases.values())):
        return None
    kinds = {layer: _kind(base) for layer, base in bases.items()}
    patterns = _made_by_peft({kind: bases[layer] for layer, kind in kinds.items()}, name)
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    network.peft_config = {name: config}
    network._hf_peft_config_loaded = True
    made = {}
    for layer, base in bases.items():
        made[layer] = _like(patterns[kinds[layer]], base, layer)
        parent, _, child = layer.rpartition(".")
        setattr(find(network, parent), child, made[layer])
    return made


def find(network: nn.Module, name: str) -> nn.Module:
    """network.get_submodule(name), which takes its time."""
    for part in name.split(".") if name else ():
        network = network._modules[part]
    return network


def table_of(layer: nn.Module, attribute: str) -> Any:
    """One of the tables by adapter that peft's layers have, or None: getattr(), which takes its time for a module.

    Of a ModuleDict, what it holds: setting an item of it checks names, which here are other adapters' already.
    """
    if (table := layer._modules.get(attribute)) is not None:
        return table._modules if type(table) is nn.ModuleDict else table
    return getattr(layer, attribute, None)


def offloaded(module: nn.Module) -> bool:
    """Whether accelerate's or diffusers' hooks bring its weights to where it computes."""
    return "_hf_hook" in module.__dict__ or "_diffusers_hook" in module.__dict__


def _is_bare(base: nn.Module) -> bool:
    weight = base._parameters.get("weight")
    plain = type(base) in _BASES and type(weight) is nn.Parameter and type(weight.data) is torch.Tensor
    hooks = base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks
    return plain and not weight.is_meta and not hooks and not offloaded(base) and "forward" not in base.__dict__


def _kind(base: nn.Module) -> tuple:
    """What decides how peft wraps a layer, sizes apart."""
    window = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    shape = tuple(getattr(base, attribute, None) for attribute in window)
    return type(base), shape, base.weight.dtype, base.weight.device, base.bias is None, base.training


def _made_by_peft(bases: dict[tuple, nn.Module], name: str) -> dict[tuple, nn.Module]:
    """peft's layer around each of these, with an adapter of that name and rank 1."""
    from peft import LoraConfig, inject_adapter_in_model

    holder = nn.Module()
    for i, base in enumerate(bases.values()):
        holder.add_module(f"layer_{i}", base)
    config = LoraConfig(r=1, lora_alpha=1, target_modules=list(holder._modules))
    inject_adapter_in_model(config, holder, adapter_name=name)
    return dict(zip(bases, holder.children(), strict=True))


def _like(pattern: nn.Module, base: nn.Module, layer: str) -> nn.Module:
    """A layer of peft's as `pattern` around another, by that name; the adapter's matrices are the pattern's."""
    made = copied(pattern)
    if "target_name" in getattr(made, "kwargs", ()):
        made.kwargs["target_name"] = layer
    made._modules = {
        key: base if key == "base_layer" else copied(child) if isinstance(child, nn.Module) else child
        for key, child in pattern._modules.items()
    }
    linear = isinstance(base, nn.Linear)
    made.in_features = base.in_features if linear else base.in_channels
    made.out_features = base.out_features if linear else base.out_channels
    return made


def copied(module: nn.Module) -> nn.Module:
    """A module with tables of its own for its parameters, children and hooks, and what is in them shared."""
    made = type(module).__new__(type(module))
    made.__dict__ = {key: value.copy() if type(value) in _TABLES else value for key, value in module.__dict__.items()}
    return made
