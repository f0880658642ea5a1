"""A training step of ours beside stock's from the same seed: what drops values, and what is computed again."""

from __future__ import annotations

import copy
import functools

import pytest
import tiny
import torch
from diffusers import UNet2DModel
from peft import LoraConfig
from torch import nn
from torch.utils.checkpoint import checkpoint

from ldmfast.models.autoencoder import AutoencoderKL
from ldmfast.models.unet import UNet
from ldmfast.models.unet2d import UNet2D


def step(model, arguments) -> list[torch.Tensor]:
    """The answer and every gradient, those of the inputs too."""
    arguments = {
        name: value.clone().requires_grad_() if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in arguments.items()
    }
    torch.manual_seed(11)
    answer = model.train()(**arguments).sample
    answer.square().mean().backward()
    leaves = [x for x in (*arguments.values(), *model.parameters()) if torch.is_tensor(x)]
    return [answer, *(x.grad for x in leaves if x.grad is not None)]


def assert_steps_are_equal(stock, ours, arguments) -> None:
    wanted, got = (step(model, arguments) for model in (stock, ours))
    assert len(got) == len(wanted) > 10
    assert max(map(tiny.error, got, wanted)) <= 1e-4


@pytest.mark.parametrize("recomputed", [False, True])
def test_the_same_seed_drops_the_same_values(recomputed):
    stock = tiny.unet(dropout=0.3)
    ours = UNet.from_unet(copy.deepcopy(stock))
    if recomputed:
        stock.enable_gradient_checkpointing()
        ours.enable_gradient_checkpointing()
    assert_steps_are_equal(stock, ours, tiny.inputs(stock))


@pytest.mark.parametrize("attention", [True, False])
def test_an_unconditional_network_drops_the_same_values(attention):
    down, up = ("AttnDownBlock2D", "AttnUpBlock2D") if attention else ("DownBlock2D", "UpBlock2D")
    torch.manual_seed(0)
    stock = UNet2DModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", down),
        up_block_types=(up, "UpBlock2D"),
        add_attention=attention,
        norm_num_groups=8,
        dropout=0.3,
    )
    ours = UNet2D.from_unet(copy.deepcopy(stock))
    arguments = {"sample": torch.randn(2, 4, 16, 16), "timestep": torch.tensor([3, 700])}
    assert_steps_are_equal(stock, ours, arguments)
    assert bool(ours.train().stock_reason()) == attention
    assert ours.eval().stock_reason() is None


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_a_reentrant_checkpoint(family):
    stock = tiny.unet(family)
    ours = UNet.from_unet(copy.deepcopy(stock))
    for model in (stock, ours):
        model.enable_gradient_checkpointing(functools.partial(checkpoint, use_reentrant=True))
    assert_steps_are_equal(stock, ours, tiny.inputs(stock))
    assert ours.explain() == []


def test_a_checkpointing_function_sees_the_modules_that_stock_gives_it():
    def chosen(seen, module, *arguments):
        seen.append(type(module).__name__)
        if module.training and isinstance(module, nn.Module):
            return checkpoint(module, *arguments, use_reentrant=False)
        return module(*arguments)

    stock = tiny.unet()
    ours, seen = UNet.from_unet(copy.deepcopy(stock)), {}
    for name, model in (("stock", stock), ("ours", ours)):
        model.enable_gradient_checkpointing(functools.partial(chosen, seen.setdefault(name, [])))
    assert_steps_are_equal(stock, ours, tiny.inputs(stock))
    assert seen["ours"] == seen["stock"] and len(seen["stock"]) > 10
    assert "checkpointed by" in " ".join(ours.explain()) and "chosen" in " ".join(ours.explain())
    with torch.no_grad():
        assert ours.explain() == []


LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "time_emb_proj", "linear_1")
CONVOLUTIONS = ("conv1", "conv2", "conv_shortcut", "proj_in", "proj_out", "conv_in", "conv_out", "conv")


@pytest.mark.parametrize("targets", [LAYERS, CONVOLUTIONS, LAYERS + CONVOLUTIONS], ids=["linear", "conv", "all"])
@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_a_lora_drops_the_same_values(family, targets):
    """Random numbers fall as memory goes, and in the order of stock's calls."""
    stock = with_lora(tiny.unet(family), targets)
    assert_steps_are_equal(stock, UNet.from_unet(copy.deepcopy(stock)), tiny.inputs(stock))


@pytest.mark.parametrize("targets", [LAYERS[:4], CONVOLUTIONS, LAYERS + CONVOLUTIONS], ids=["linear", "conv", "all"])
def test_a_lora_of_an_autoencoder_drops_the_same_values(targets):
    stock = with_lora(tiny.vae(), targets)
    ours = AutoencoderKL.from_vae(copy.deepcopy(stock))
    assert_steps_are_equal(stock, ours, {"sample": torch.randn(2, 3, 16, 16)})


def with_lora(model, targets):
    model.add_adapter(LoraConfig(r=4, lora_dropout=0.3, target_modules=list(targets), init_lora_weights=False))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    return model
