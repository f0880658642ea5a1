"""A first LoRA file's layers, which are copies of a few of peft's, beside those that peft makes for each by itself."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from test_lora_formats import LAYERS, answer, file_of, loha, lora
from torch import nn

from ldmfast.models.unet import UNet
from ldmfast.pipeline import lora_adapter
from ldmfast.pipeline.load_lora import load_lora


def described(value):
    """A value of a layer's, as something that can be compared."""
    if isinstance(value, dict):
        return {key: described(inner) for key, inner in value.items()}
    if isinstance(value, torch.Tensor):
        return value.dtype, value.requires_grad, value.stride(), value.tolist()
    return (
        (type(value), value) if isinstance(value, str | int | float | bool | tuple | list | set | None) else type(value)
    )


def parts(network):
    """{name: (type, attributes)} of every module."""
    return {name: (type(module), described(module.__dict__)) for name, module in network.named_modules()}


def put_on_by_peft(monkeypatch):
    monkeypatch.setattr(lora_adapter, "wrap", lambda *_: None)


@pytest.mark.parametrize(("method", "dtype"), [(loha, torch.float32), (lora, torch.bfloat16)], ids=["loha", "bfloat16"])
def test_they_are_what_peft_makes(method, dtype, tmp_path, monkeypatch):
    """Every attribute of every module, every parameter's value, layout and whether it takes a gradient."""
    stock, file = tiny.unet(), tmp_path / "a.safetensors"
    file_of(stock, method, file)
    ours, theirs = (UNet.from_unet(copy.deepcopy(stock)).to(dtype) for _ in range(2))
    load_lora(ours, (file, 0.3))
    put_on_by_peft(monkeypatch)
    load_lora(theirs, (file, 0.3))
    got, wanted = parts(ours), parts(theirs)
    assert list(got) == list(wanted)
    for name in wanted:
        if name:  # the network has peft's configuration, which is compared below
            assert got[name] == wanted[name], name
    assert set(ours.__dict__) == set(theirs.__dict__)
    assert ours.active_adapters() == theirs.active_adapters() and ours._hf_peft_config_loaded
    assert {name: p.requires_grad for name, p in ours.named_parameters()} == {
        name: p.requires_grad for name, p in theirs.named_parameters()
    }
    shared = [table for module in ours.modules() for table in module.__dict__.values() if isinstance(table, dict)]
    assert len({id(table) for table in shared}) == len(shared)  # a hook on one is no other's


def test_the_file_that_it_is_saved_to_is_the_same(tmp_path, monkeypatch):
    stock, file = tiny.unet(), tmp_path / "a.safetensors"
    file_of(stock, lora, file)
    saved, arguments = [], tiny.inputs(stock)
    for folder in ("ours", "theirs"):
        network = UNet.from_unet(copy.deepcopy(stock))
        load_lora(network, file)
        (name,) = network.peft_config
        network.save_lora_adapter(tmp_path / folder, name)
        again = UNet.from_unet(copy.deepcopy(stock))
        load_lora(again, tmp_path / folder)
        saved += [answer(again, arguments), answer(network, arguments)]
        put_on_by_peft(monkeypatch)
    assert all(torch.equal(picture, saved[0]) for picture in saved)


def hooked(network):
    network.get_submodule(LAYERS[0]).register_forward_hook(lambda *_: None)


def quantised(network):
    class Quantised(nn.Linear):
        pass

    network.get_submodule(LAYERS[0]).__class__ = Quantised


def adapted(network):
    from peft import LoraConfig

    network.add_adapter(LoraConfig(r=2, target_modules=["to_v"]), "own")


def to_be_swapped(network):
    network.enable_lora_hotswap(target_rank=8)


def cast_when_called(network):
    network.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)


@pytest.mark.parametrize("change", [hooked, quantised, adapted, to_be_swapped, cast_when_called])
def test_a_network_that_is_more_than_its_layers_is_left_to_peft(change, tmp_path, monkeypatch):
    stock, file = tiny.unet(), tmp_path / "a.safetensors"
    file_of(stock, lora, file)
    network, made = UNet.from_unet(copy.deepcopy(stock)), []
    change(network)
    wrap = lora_adapter.wrap
    monkeypatch.setattr(lora_adapter, "wrap", lambda *arguments: made.append(wrap(*arguments)))
    before = parts(network) if change is not adapted else None
    load_lora(network, file)
    assert made == [None] and before != parts(network)
