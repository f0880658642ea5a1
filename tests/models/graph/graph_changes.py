"""Rows of the table of ldmfast/models/graph: changes that a graph sees, that make another one, that end it."""

from __future__ import annotations

import tiny
import torch
from diffusers.training_utils import EMAModel
from graph_calls import inputs
from torch import nn

from ldmfast import UNet

# --- seen -------------------------------------------------------------------------------------------------------------


def values(u, a):
    for name in ("sample", "encoder_hidden_states"):
        a[name] = torch.randn_like(a[name])


def a_number(u, a):
    a["timestep"] = 7


def an_element(u, a):
    a["timestep"] = torch.tensor(7)


def weights_in_place(u, a):
    ema = EMAModel(u.parameters(), model_cls=UNet, model_config=u.config)
    for x in ema.shadow_params:
        x.mul_(1.5)
    ema.copy_to(u.parameters())


def fused(u, a):
    u.fuse_lora()
    u.unload_lora()


def lora_in_place(u, a):
    for name, x in u.named_parameters():
        if "lora_B" in name:
            x.data.mul_(2)


SEEN = {
    "values of the inputs": (values,),
    "timestep: a number, [] or [N]": (a_number, an_element),
    "weights in place": (weights_in_place,),
    "LoRA matrices in place": (lora_in_place,),
}


# --- another graph ----------------------------------------------------------------------------------------------------


def shape(u, a):
    a |= inputs(u, batch=1)


def tokens(u, a):
    a |= inputs(u, tokens=9)


def dtype(u, a):
    a["timestep"] = a["timestep"].float()


def layout(u, a):
    a["sample"] = a["sample"].contiguous(memory_format=torch.channels_last)


def control(u, a):
    n, s = 2, u.device
    shapes = [(16, 8), (16, 8), (16, 4), (32, 4)]
    a["down_block_additional_residuals"] = tuple(torch.randn(n, c, d, d, device=s) for c, d in shapes)
    a["mid_block_additional_residual"] = torch.randn(n, 32, 4, 4, device=s)


def mask(u, a):
    a["encoder_attention_mask"] = torch.ones(2, 7, device=u.device).tril(3)


def lora_scale(u, a):
    a["cross_attention_kwargs"] = {"scale": 0.5}


def adapter_scale(u, a):
    u.set_adapters("one", 0.25)


def adapters_off(u, a):
    u.disable_adapters()


def adapters_on(u, a):
    u.enable_adapters()


def whole_adapter(u, a):
    u.set_adapters("one", 1.0)


def epsilon(u, a):
    u.down_blocks[0].resnets[0].norm1.eps = 0.5


def epsilon_back(u, a):
    u.down_blocks[0].resnets[0].norm1.eps = 1e-5


def training(u, a):
    u.train()


def trained(u, a):
    u.eval()


def drop_scale(u, a):
    del a["cross_attention_kwargs"]


def drop_control(u, a):
    del a["down_block_additional_residuals"], a["mid_block_additional_residual"]


ANOTHER = {
    "shape, dtype or layout of an input": [(shape, None), (tokens, None), (dtype, None), (layout, None)],
    "an argument given or left out": [(control, drop_control), (mask, None)],
    "LoRA's scale or choice of adapters": [
        (lora_scale, drop_scale),
        (adapter_scale, whole_adapter),
        (adapters_off, adapters_on),
    ],
    "a module's attribute (eps, groups, ...)": [(epsilon, epsilon_back), (training, trained)],
}


# --- captured again ---------------------------------------------------------------------------------------------------


def converted(u, a):
    u.to(torch.bfloat16)
    a |= tiny.to(a, torch.bfloat16)


def other_data(u, a):
    for x in u.parameters():
        x.data = x.data * 1.5


def other_parameter(u, a):
    m = u.mid_block.resnets[0].conv1
    m.weight = nn.Parameter(m.weight.detach() * 1.5)


def other_module(u, a):
    m = nn.Conv2d(4, 16, 3, padding=1).to(u.device)
    u.conv_in = m.requires_grad_(False)


AGAIN = {
    "weights moved, converted or replaced": (converted, other_data, other_parameter),
    "a module replaced": (other_module,),
}
