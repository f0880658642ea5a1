"""A file's changes as an adapter of peft's on a network's layers.

diffusers' and transformers' own loaders put it on. They take 0.2 to 0.6 s of a U-Net of Stable Diffusion 1, more with
each adapter that is there; so where every layer has an adapter of `load_lora`'s already, the new one is made as a copy
of that layer's, with the file's matrices in it; and a U-Net's first one around copies of a few of peft's layers.
"""

from __future__ import annotations

import contextlib
import copy
import warnings

import diffusers
import torch
from torch import nn

from ldmfast.pipeline.lora_layers import copied, find, offloaded, table_of, wrap
from ldmfast.released.lora.lora_matrices import Change
from ldmfast.released.lora.lora_names import UNET

PREFIX = "ldmfast_"  # of the names of adapters that load_lora made


def attach(network: nn.Module, part: str, changes: dict[str, Change], name: str) -> None:
    """Put an adapter of that name on the layers of `network` (the `part` of a pipeline) that `changes` has.

    Raises RuntimeError or ValueError, from peft, for what does not fit.
    """
    from ldmfast.models.lora_norm import adapt_norm  # needs peft

    pairs = {layer: change for layer, change in changes.items() if change.up is not None}
    if pairs and (_attach_by_copies(network, pairs, name) or _attach_first(network, pairs, name)):
        pass
    elif pairs:
        state = _peft_state(pairs)
        with _quiet():
            if part == UNET:
                network.load_lora_adapter(state, prefix=None, adapter_name=name)
            else:
                network.load_adapter(peft_config=_config(pairs), adapter_state_dict=state, adapter_name=name)
    else:
        network.peft_config = {**(getattr(network, "peft_config", None) or {}), name: _config({})}
        network._hf_peft_config_loaded = True
    for layer, change in changes.items():
        if change.up is None:
            adapt_norm(network, layer, name, change.norm_weight, change.norm_bias)


@contextlib.contextmanager
def _quiet():
    """Without transformers' progress bar and report, which calls earlier adapters missing, and peft's like warning."""
    from transformers.utils import logging

    bar, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def _peft_state(pairs: dict[str, Change]) -> dict[str, torch.Tensor]:
    """The pairs under peft's names; a bias or a magnitude is had by all layers or none."""
    biased = any(change.bias is not None for change in pairs.values())
    dora = [change.magnitude is not None for change in pairs.values()]
    if any(dora) and (biased or not all(dora)):
        raise ValueError("DoRA on some layers and plain matrices or biases on others cannot be had in one adapter")
    state = {}
    for layer, change in pairs.items():
        state[f"{layer}.lora_A.weight"] = change.down.float()
        state[f"{layer}.lora_B.weight"] = change.scaled_up().float().contiguous()
        if biased:
            rows = len(change.up)
            state[f"{layer}.lora_B.bias"] = torch.zeros(rows) if change.bias is None else change.bias
        if change.magnitude is not None:
            shape = (1, -1, 1, 1) if change.up.ndim == 4 else (-1,)
            state[f"{layer}.lora_magnitude_vector"] = change.magnitude.reshape(shape)
    return state


def _config(pairs: dict[str, Change]):
    """peft's configuration of a text encoder's adapter, or of an empty one."""
    from peft import LoraConfig

    ranks = {layer: change.up.shape[1] for layer, change in pairs.items()}
    return LoraConfig(
        r=1,
        lora_alpha=1,
        rank_pattern=dict(ranks),
        alpha_pattern=dict(ranks),
        target_modules=list(pairs),
        lora_bias=any(change.bias is not None for change in pairs.values()),
        use_dora=any(change.magnitude is not None for change in pairs.values()),
    )


def _attach_by_copies(network: nn.Module, pairs: dict[str, Change], name: str) -> bool:
    """Do it by copying an adapter of each layer; False, with nothing done, where a layer has none to copy."""
    if not getattr(network, "peft_config", None) or offloaded(network) or not _are_matrices(pairs):
        return False
    copies = []
    for layer, change in pairs.items():
        module = find(network, layer)
        like = None if offloaded(module) else _template(module)
        if like is None:
            return False
        copies.append((module, like, change))
    config = copy.copy(network.peft_config[copies[0][1]])
    ranks = {layer: change.up.shape[1] for layer, change in pairs.items()}
    config.r, config.lora_alpha, config.rank_pattern, config.alpha_pattern = 1, 1, dict(ranks), dict(ranks)
    config.target_modules = set(pairs)
    network.peft_config[name] = config
    for module, like, change in copies:
        _copy_adapter(module, like, name, change)
    return True


def _attach_first(network: nn.Module, pairs: dict[str, Change], name: str) -> bool:
    """Do it to a network of diffusers' without adapters; False, with nothing done, to another (lora_layers.wrap)."""
    if not isinstance(network, diffusers.ModelMixin) or not _are_matrices(pairs):
        return False
    layers = wrap(network, list(pairs), _config(pairs), name)
    for layer, module in (layers or {}).items():
        _copy_adapter(module, name, name, pairs[layer])
    return layers is not None


def _are_matrices(pairs: dict[str, Change]) -> bool:
    return all(change.bias is None and change.magnitude is None for change in pairs.values())


def _template(layer: nn.Module) -> str | None:
    """The name of an adapter of this layer that is two matrices and no more, made by load_lora."""
    from peft.tuners.lora import LoraLayer

    if not isinstance(layer, LoraLayer):
        return None
    downs, ups = table_of(layer, "lora_A"), table_of(layer, "lora_B")
    extras = [table_of(layer, name) or {} for name in ("use_dora", "lora_bias", "lora_variant")]
    for name in downs:
        more = any(name in extra and extra[name] for extra in extras)
        weights = (table[name]._parameters["weight"] for table in (downs, ups))
        if name.startswith(PREFIX) and not more and not any(weight.is_meta for weight in weights):
            return name
    return None


def _copy_adapter(layer: nn.Module, like: str, name: str, change: Change) -> None:
    rank = change.up.shape[1]
    new = {"r": rank, "lora_alpha": rank, "scaling": 1.0}  # the factors have the scale in them
    new["lora_A"] = _copied(table_of(layer, "lora_A")[like], change.down)
    new["lora_B"] = _copied(table_of(layer, "lora_B")[like], change.scaled_up())
    for attribute in (*layer.adapter_layer_names, *layer.other_param_names):
        table = table_of(layer, attribute)
        if table is not None and like in table:
            table[name] = new[attribute] if attribute in new else _another(table[like])


def _another(value):
    return copied(value) if isinstance(value, nn.Module) else copy.copy(value)


def _copied(module: nn.Module, weight: torch.Tensor) -> nn.Module:
    """A linear layer or convolution like `module`, its dtype and device, with another weight."""
    made = copied(module)
    like = module._parameters["weight"]
    whole = weight.float()  # from float16 to bfloat16 torch takes twice as long as by way of float32
    own = whole.to(like.device, like.dtype, copy=whole is weight).contiguous()
    made._parameters["weight"] = nn.Parameter(own, requires_grad=like.requires_grad)
    rows, columns = weight.shape[:2]
    if isinstance(module, nn.Linear):
        made.__dict__ |= {"in_features": columns, "out_features": rows}
    else:
        made.__dict__ |= {"in_channels": columns, "out_channels": rows}
    return made
