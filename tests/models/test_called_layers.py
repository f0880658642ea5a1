"""A module that is called as it is (guard.py) is as near the exact result inside our network as inside the stock one.

torch's GroupNorm on a CPU loses an off-centre channels_last image's variance, which the stock model never gives it.
"""

from __future__ import annotations

import copy

import diffusers
import pytest
import tiny
import torch
from torch import nn

from ldmfast.models.autoencoder import AutoencoderKL
from ldmfast.models.unet import UNet
from ldmfast.models.unet2d import UNet2D

LEVELS = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8}
UNET = (
    "down_blocks.0",
    "down_blocks.1",
    "mid_block",
    "up_blocks.0",
    "up_blocks.1",
    "down_blocks.0.attentions.0",
    "down_blocks.0.attentions.0.norm",
    "down_blocks.0.resnets.0",
    "down_blocks.0.resnets.0.norm1",
    "up_blocks.1.resnets.0",
    "up_blocks.1.resnets.0.norm2",
)
UNET2D = ("down_blocks.0", "down_blocks.0.attentions.0.group_norm", "up_blocks.1")
AUTOENCODER = ("encoder", "decoder", "decoder.up_blocks.1")
CASES = [("unet", name) for name in UNET] + [("unet2d", name) for name in UNET2D]
CASES += [("autoencoder", name) for name in AUTOENCODER]


def off_centre(model: nn.Module) -> nn.Module:
    """What the norms read has a mean of some hundred standard deviations, the same in all channels."""
    for name, module in model.named_modules():
        if name.endswith(("conv_in", "conv1")):
            module.bias.data += 100.0
    return model.eval()


def made(kind):
    """(stock model, our class, what is compared of one)"""
    torch.manual_seed(0)
    if kind == "autoencoder":
        blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
        model, x = tiny.vae(**LEVELS, **blocks), torch.randn(1, 3, 16, 16)
        return off_centre(model), AutoencoderKL, lambda m: m(x.to(m.dtype), return_dict=False)[0]
    if kind == "unet2d":
        blocks = {"down_block_types": ("AttnDownBlock2D", "DownBlock2D")}
        blocks |= {"up_block_types": ("UpBlock2D", "AttnUpBlock2D")}
        model = diffusers.UNet2DModel(sample_size=8, attention_head_dim=8, **LEVELS, **blocks)
        x = torch.randn(1, 3, 8, 8)
        return off_centre(model), UNet2D, lambda m: m(x.to(m.dtype), 5, return_dict=False)[0]
    blocks = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")}
    model = tiny.unet(**LEVELS, **blocks, up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
    given = tiny.inputs(model, (8, 8))

    def run(m):
        cast = {k: v.to(m.dtype) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in given.items()}
        return m(**cast, return_dict=False)[0]

    return off_centre(model), UNet, run


@pytest.mark.parametrize(("kind", "name"), CASES)
@torch.no_grad()
def test_a_called_module_is_as_exact_as_in_the_stock_model(kind, name):
    stock, ours, run = made(kind)
    exact, theirs = run(copy.deepcopy(stock).double()), run(stock)
    ours = ours.adopt(stock)
    seen = []
    ours.get_submodule(name).register_forward_hook(lambda *_: seen.append(1))
    got = run(ours)
    assert seen
    assert tiny.error(got, exact) <= 2 * tiny.error(theirs, exact) + 1e-6
    assert got.stride() == theirs.stride()


class Around(nn.Module):
    """Another class in a module's place, with none of its attributes. What it returns is told from the module's."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = [inside]  # not a child: nothing is found by a walk

    def forward(self, *arguments, **named):
        y = self.inside[0](*arguments, **named)
        return 1.25 * y if isinstance(y, torch.Tensor) else y


def answer(model, name, run):
    """What `run` gets while the named module's place is taken, or what is raised."""
    parent, _, leaf = name.rpartition(".")
    parent, module = model.get_submodule(parent), model.get_submodule(name)
    setattr(parent, leaf, Around(module))
    try:
        return run(model)
    except (AttributeError, TypeError, RuntimeError) as why:
        return why
    finally:
        setattr(parent, leaf, module)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", ["unet", "unet2d", "autoencoder"])
@torch.no_grad()
def test_a_module_of_another_class_anywhere(kind, training):
    stock, ours, run = made(kind)
    stock.train(training)
    ours = ours.adopt(copy.deepcopy(stock))
    plain, compared = run(stock), 0
    for name, _ in list(stock.named_modules())[1:]:
        wanted, got = answer(stock, name, run), answer(ours, name, run)
        if isinstance(wanted, Exception):
            assert isinstance(got, Exception), name
            continue
        assert isinstance(got, torch.Tensor), (name, got)
        assert tiny.error(got, wanted) <= 1e-4, name  # the off-centre mean takes two digits
        compared += not torch.equal(wanted, plain)
    assert compared > 20
