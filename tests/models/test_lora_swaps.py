"""One LoRA file after another on the same network: what is read again, what is made again, what stays."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from lora_files import LAYERS, METHODS, RANK, answer, file_of, kohya, loha, lora, made, whole
from safetensors.torch import save_file
from torch import nn

from ldmfast.models.unet import UNet
from ldmfast.pipeline.load_lora import load_lora


def test_a_swap_reads_nothing_again_and_takes_a_changed_file_anew(tmp_path, monkeypatch):
    from ldmfast.pipeline import load_lora as pipeline_lora

    stock, first, second = tiny.unet(), tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    wanted = {first: file_of(stock, lora, first), second: file_of(stock, whole, second)}
    ours, arguments, reads = UNet.from_unet(copy.deepcopy(stock)), tiny.inputs(stock), []
    real = pipeline_lora.read_lora
    monkeypatch.setattr(pipeline_lora, "read_lora", lambda *a: reads.append(a[0].name) or real(*a))
    for path in (first, second, first, second):
        load_lora(ours, (path, 0.3))
        assert tiny.error(answer(ours, arguments), answer(wanted[path], arguments)) < 2e-5
    assert reads == ["a.safetensors", "b.safetensors"]
    changed = file_of(stock, loha, first)
    ours.fuse_lora()  # what is fused comes out again
    load_lora(ours, (first, 0.3))
    assert tiny.error(answer(ours, arguments), answer(changed, arguments)) < 2e-5
    load_lora(ours)
    assert not any(isinstance(module, nn.ParameterDict) for module in ours.modules())


def refuse(monkeypatch):
    """peft's search for layers to wrap is not to be gone through again."""
    from peft.tuners.tuners_utils import BaseTuner

    def inject_adapter(*arguments, **named):
        raise AssertionError("peft went through the network again")

    monkeypatch.setattr(BaseTuner, "inject_adapter", inject_adapter)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
def test_another_file_for_the_same_layers_is_a_copy_of_the_adapter_that_is_there(method, tmp_path, monkeypatch):
    stock, first, second = tiny.unet(), tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    held, wanted = file_of(stock, lora, first), file_of(stock, method, second, layers=LAYERS[1:])
    ours, arguments = UNet.from_unet(copy.deepcopy(stock)), tiny.inputs(stock)
    load_lora(ours, (first, 0.3))
    assert tiny.error(answer(ours, arguments), answer(held, arguments)) < 2e-5
    refuse(monkeypatch)
    load_lora(ours, (second, 0.3))
    assert tiny.error(answer(ours, arguments), answer(wanted, arguments)) < 2e-5
    trained = {name for name, value in ours.named_parameters() if value.requires_grad and ".lora_" in name}
    assert len(trained) == 2 * len(LAYERS[1:])  # as peft has it: the adapters that are on
    ours.fuse_lora()
    assert tiny.error(answer(ours, arguments), answer(wanted, arguments)) < 2e-5
    load_lora(ours, (first, 0.3))
    assert tiny.error(answer(ours, arguments), answer(held, arguments)) < 2e-5
    load_lora(ours)
    assert not getattr(ours, "peft_config", None)
    ours.load_state_dict(stock.state_dict())  # what was fused came out again but for its rounding
    assert torch.equal(answer(ours, arguments), answer(UNet.from_unet(copy.deepcopy(stock)), arguments))


def test_a_copy_has_the_dtype_of_the_network_and_a_hook_of_its_own(tmp_path):
    stock, first, second = tiny.unet(), tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    file_of(stock, lora, first), file_of(stock, loha, second)
    ours, called = UNet.from_unet(copy.deepcopy(stock)).to(torch.bfloat16), []
    load_lora(ours, first)
    down = ours.get_submodule(LAYERS[0]).lora_A
    (before,) = down
    load_lora(ours, second)
    (after,) = set(down) - {before}
    down[after].register_forward_hook(lambda *_: called.append(after))
    assert down[after].weight.dtype == down[before].weight.dtype and not down[before]._forward_hooks
    assert (down[after].in_features, down[after].out_features) == (32, RANK**2)
    answer(ours, tiny.to(tiny.inputs(stock), torch.bfloat16))
    assert called == [after]


def test_what_is_more_than_two_matrices_is_put_on_by_peft(tmp_path):
    """A DoRA over a plain adapter, and a plain one over it."""
    stock, arguments = tiny.unet(), tiny.inputs(tiny.unet())
    layer, new = LAYERS[0], made(3)
    path = {name: tmp_path / f"{name}.safetensors" for name in ("plain", "dora", "another")}
    methods = (("plain", lora), ("another", loha))
    wanted = {name: file_of(stock, way, path[name], layers=LAYERS[:1], factor=1.0) for name, way in methods}
    tensors, delta = lora(stock.get_submodule(layer).weight.shape, new)
    tensors["dora_scale"] = new(32, 1).abs() + 0.5
    save_file({f"{kohya(layer)}.{key}": value for key, value in tensors.items()}, path["dora"])
    wanted["dora"] = copy.deepcopy(stock)
    weight = wanted["dora"].get_submodule(layer).weight
    weight.data += delta
    weight.data *= tensors["dora_scale"] / weight.data.norm(dim=1, keepdim=True)
    ours = UNet.from_unet(copy.deepcopy(stock))
    for name in ("plain", "dora", "another", "plain", "dora"):
        load_lora(ours, path[name])
        assert tiny.error(answer(ours, arguments), answer(wanted[name], arguments)) < 2e-5
