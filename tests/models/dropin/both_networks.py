"""What the drop-in tests share: a stock network and ours of one configuration, and changes made to both."""

from __future__ import annotations

import copy

import accelerate
import tiny
import torch
from peft import LoraConfig

from ldmfast.models.unet import UNet

CLOSE = 1e-5


def pair(family="sd1", **changes):
    stock = tiny.unet(family, **changes)
    return stock, UNet.from_unet(copy.deepcopy(stock))


def answers(models, **extra):
    """The answers of the models to one set of arguments."""
    arguments = {**tiny.inputs(models[0]), **extra}
    with torch.no_grad():
        return [model(**arguments).sample for model in models]


def randomise(model, scale, mark=""):
    """Random parameters, the same for any layout: randn_like would fill a channels_last one in another order."""
    torch.manual_seed(7)
    for name, parameter in model.named_parameters():
        if mark in name:
            parameter.data.add_(scale * torch.randn(parameter.shape))


def lora(model, layers=("to_q", "to_v", "ff.net.0.proj", "conv1", "time_emb_proj")):
    torch.manual_seed(5)
    model.add_adapter(LoraConfig(r=3, target_modules=list(layers)))
    randomise(model, 0.2, "lora_")


def freeu(model):
    model.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)


def sequential_offload(model):
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
