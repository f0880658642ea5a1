"""`UNet` as diffusers programs change it: patched, hooked, with adapters, offloaded.

Each test does the same to a stock network and to ours, and wants the same answer.
"""

from __future__ import annotations

import accelerate
import pytest
import tiny
import torch
from both_networks import CLOSE, answers, freeu, lora, pair, randomise, sequential_offload
from diffusers.models import attention_processor
from diffusers.training_utils import EMAModel
from torch import nn

from ldmfast.models.unet import UNet

# What is done to a network. Every entry must change what stock answers, or (second part) how it gets there.


def fused_lora(model):
    lora(model)
    model.fuse_lora()


def lora_on_every_layer(model):
    lora(model, [name for name, module in model.named_modules() if type(module) in (nn.Linear, nn.Conv2d)])


def in_place(model):
    """As EMAModel.copy_to and peft's merging do it: through .data, no version counter moves."""
    randomise(model, 0.05)


def ema(model):
    average = EMAModel(model.parameters(), decay=0.5)
    in_place(model)
    average.step(model.parameters())
    average.copy_to(model.parameters())


def hooks_on_norms_and_linears(model):
    for module in model.modules():
        if isinstance(module, nn.GroupNorm | nn.Linear):
            module.register_forward_hook(lambda module, inputs, output: output * 1.05)


def hooks_on_blocks(model):
    for block in (model.up_blocks[1], model.mid_block.resnets[0], model.down_blocks[0].attentions[0]):
        block.register_forward_pre_hook(lambda module, inputs: None)
        block.register_forward_hook(
            lambda module, inputs, output: tuple(o * 1.1 for o in output) if isinstance(output, tuple) else output * 1.1
        )


def patched_forward(model):
    norm = model.down_blocks[0].resnets[0].norm1
    original = norm.forward
    norm.forward = lambda x: original(x) * 1.5


def replaced_layer(model):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    attention = model.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    new = Doubled(attention.to_q.in_features, attention.to_q.out_features, bias=False)
    new.load_state_dict(attention.to_q.state_dict())
    attention.to_q = new


def processor(model):
    class Scaled(attention_processor.AttnProcessor2_0):
        def __call__(self, attn, hidden_states, *args, **kwargs):
            return 0.5 * super().__call__(attn, hidden_states, *args, **kwargs)

    model.set_attn_processor(Scaled())


CHANGES = [
    lora,
    fused_lora,
    lora_on_every_layer,
    in_place,
    ema,
    hooks_on_norms_and_linears,
    hooks_on_blocks,
    patched_forward,
    replaced_layer,
    processor,
    freeu,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_network_answers_as_stock_changed_likewise(change):
    stock, ours = pair()
    answers([ours])  # a first answer, so that anything kept from it would show
    before = answers([stock])[0]
    torch.manual_seed(11)
    arguments = tiny.inputs(stock)
    for model in (stock, ours):
        change(model)
    wanted, got = answers([stock, ours], **arguments)
    assert tiny.error(got, wanted) <= CLOSE
    with torch.no_grad():
        assert tiny.error(before, wanted) > 1e-2
    unmodified = change in (fused_lora, in_place, ema)
    assert unmodified or ours.explain(), "explain() must say that something is called as it is"


def slicing(model):
    model.set_attention_slice("max")


def fused_qkv(model):
    model.fuse_qkv_projections()


def default_processors(model):
    model.set_default_attn_processor()


def chunked(model):
    for module in model.modules():
        if hasattr(module, "set_chunk_feed_forward"):
            module.set_chunk_feed_forward(4, 1)


def layerwise_casting(model):
    model.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32)


def group_offload_leaves(model):
    model.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")


def group_offload_blocks(model):
    model.enable_group_offload(torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1)


def hooked_and_unhooked(model):
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    accelerate.hooks.remove_hook_from_module(model, recurse=True)


def contiguous_weights(model):
    model.to(memory_format=torch.contiguous_format)


def channels_last_weights(model):
    model.to(memory_format=torch.channels_last)


def compiled_blocks(model):
    for module in model.modules():
        if type(module).__name__ == "BasicTransformerBlock":
            module.compile(backend="eager")


WAYS = [
    slicing,
    fused_qkv,
    default_processors,
    chunked,
    layerwise_casting,
    group_offload_leaves,
    group_offload_blocks,
    sequential_offload,
    hooked_and_unhooked,
    contiguous_weights,
    channels_last_weights,
    compiled_blocks,
]


@pytest.mark.parametrize("change", WAYS, ids=lambda change: change.__name__)
def test_another_way_to_the_same_answer(change):
    stock, ours = pair()
    arguments = tiny.inputs(stock)
    for model in (stock, ours):
        change(model)
    wanted, got = answers([stock, ours], **arguments)
    assert tiny.error(got, wanted) <= CLOSE
    plain = change in (default_processors, hooked_and_unhooked, contiguous_weights, channels_last_weights)
    assert plain == (ours.explain() == []), ours.explain()


def test_dynamic_quantisation():
    quantization = pytest.importorskip("torch.ao.quantization")
    stock, ours = (quantization.quantize_dynamic(model, {nn.Linear}) for model in pair())
    wanted, got = answers([stock, ours])
    assert tiny.error(got, wanted) <= 2e-2  # the quantised layers round differently after 1e-6
    assert "Linear" in " ".join(ours.explain())


@pytest.mark.parametrize("scale", [0.0, 0.4, 1.7])
def test_lora_scale(scale):
    stock, ours = pair()
    for model in (stock, ours):
        lora(model)
    arguments = tiny.inputs(stock)
    wanted, got = answers([stock, ours], **arguments, cross_attention_kwargs={"scale": scale})
    full = answers([stock], **arguments)[0]
    assert tiny.error(got, wanted) <= CLOSE and tiny.error(full, wanted) > 1e-3
    assert tiny.error(answers([ours], **arguments)[0], full) <= CLOSE  # the scale does not stay


def test_lora_on_one_face_is_seen_by_the_other():
    stock = tiny.unet()
    ours = UNet.from_unet(stock)
    lora(stock)
    wanted, got = answers([stock, ours])
    assert tiny.error(got, wanted) <= CLOSE
