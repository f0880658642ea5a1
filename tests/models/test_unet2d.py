"""`UNet2D` and the autoencoders' attention levels against stock diffusers."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from diffusers import UNet2DModel

from ldmfast.models.autoencoder import AutoencoderKL
from ldmfast.models.unet2d import UNet2D

CLOSE = 1e-5  # norm of the difference over norm, float32
CELEBA = {
    "sample_size": 16,
    "block_out_channels": (16, 32, 48),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 8,
    "attention_head_dim": 8,
}
CHURCHES = {
    **CELEBA,
    "down_block_types": ("AttnDownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("ResnetUpsampleBlock2D", "AttnUpBlock2D", "AttnUpBlock2D"),
    "resnet_time_scale_shift": "scale_shift",
    "attn_norm_num_groups": 8,
    "downsample_type": "resnet",
    "upsample_type": "resnet",
}
INPAINTING = {
    **CELEBA,
    "in_channels": 7,
    "down_block_types": ("ResnetDownsampleBlock2D", *["AttnDownBlock2D"] * 2),
    "downsample_type": "resnet",
    "upsample_type": "resnet",
}
FAMILIES = {"celeba": CELEBA, "churches": CHURCHES, "inpainting": INPAINTING}


def pair(family="celeba", **changes):
    """(stock, ours), with parameters of their own."""
    stock = UNet2DModel(**{**FAMILIES[family], **changes}).eval()
    for parameter in stock.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return stock, UNet2D.from_unet(copy.deepcopy(stock))


def inputs(model, size=(16, 16), batch=2):
    return {"sample": torch.randn(batch, model.config.in_channels, *size), "timestep": torch.tensor([30, 700])[:batch]}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    torch.manual_seed(0)
    return pair(request.param)


@pytest.mark.parametrize("size", [(16, 16), (8, 20), (4, 4)])
@torch.no_grad()
def test_equals_stock(family, size):
    stock, ours = family
    arguments = inputs(stock, size)
    wanted, got = stock(**arguments).sample, ours(**arguments).sample
    assert tiny.error(got, wanted) <= CLOSE
    assert got.shape == wanted.shape and got.is_contiguous()
    assert ours.explain() == []


@torch.no_grad()
def test_odd_sizes_which_stock_cannot_do(family):
    _, ours = family
    assert ours(**inputs(ours, (13, 11))).sample.shape == (2, 3, 13, 11)
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        family[0](**inputs(ours, (13, 11)))


def test_gradients_equal_stock(family):
    for model, arguments in zip(family, [inputs(family[0])] * 2, strict=True):
        model.zero_grad()
        model(**arguments).sample.square().mean().backward()
    stock, ours = (dict(model.named_parameters()) for model in family)
    for name, parameter in stock.items():
        assert (ours[name].grad - parameter.grad).norm() <= 1e-4 * parameter.grad.norm() + 1e-9, name


def test_bfloat16_is_as_near_to_float32_as_stock_bfloat16(family):
    stock, ours = family
    halves = [copy.deepcopy(model).bfloat16() for model in (stock, ours)]
    errors = [[], []]
    for _ in range(3):
        arguments = inputs(stock)
        with torch.no_grad():
            exact = stock(**arguments).sample
            for model, found in zip(halves, errors, strict=True):
                found.append(tiny.error(model(**tiny.to(arguments, torch.bfloat16)).sample, exact))
    assert sum(errors[1]) <= 1.1 * sum(errors[0])


@pytest.mark.parametrize(
    "changes, extra",
    [
        ({"num_class_embeds": 5}, {"class_labels": torch.tensor([1, 4])}),
        ({"class_embed_type": "timestep"}, {"class_labels": torch.tensor([1, 4])}),
        ({"center_input_sample": True}, {}),
        ({"time_embedding_type": "fourier"}, {"timestep": torch.tensor([0.3, 0.7])}),
        ({"mid_block_type": None}, {}),
        ({"add_attention": False, "attention_head_dim": None}, {}),
        ({"resnet_time_scale_shift": "scale_shift"}, {}),
        ({"downsample_padding": 0, "mid_block_scale_factor": 1.5, "dropout": 0.1}, {}),
        ({"act_fn": "gelu"}, {}),
        (
            {
                "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D", "SkipDownBlock2D"),
                "norm_num_groups": 4,
                "up_block_types": ("SkipUpBlock2D", "AttnSkipUpBlock2D", "SkipUpBlock2D"),
                "block_out_channels": (128, 128, 128),
            },
            {},
        ),
    ],
)
@torch.no_grad()
def test_every_configuration(changes, extra):
    stock, ours = pair(**changes)
    arguments = {**inputs(stock), **extra}
    assert tiny.error(ours(**arguments).sample, stock(**arguments).sample) <= CLOSE


@torch.no_grad()
def test_a_head_width_for_each_level(tmp_path):
    """Eight heads at every level: the widths that UNet2DModel cannot name, kept when saved and refused by stock."""
    stock, _ = pair()
    ours = UNet2D(**{**CELEBA, "attention_head_dim": [2, 4, 6]})
    ours.load_state_dict(stock.state_dict())
    for m in stock.modules():
        if hasattr(m, "to_q"):
            m.heads = 8
    arguments = inputs(stock)
    wanted, got = stock(**arguments).sample, ours(**arguments).sample
    assert tiny.error(got, wanted) <= CLOSE and ours.explain() == []
    assert tiny.error(pair()[1](**arguments).sample, wanted) > CLOSE
    ours.save_pretrained(tmp_path)
    again = UNet2D.from_pretrained(tmp_path)
    assert again.config.attention_head_dim == [2, 4, 6] and torch.equal(again(**arguments).sample, got)
    with pytest.raises(TypeError):
        UNet2DModel.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"attention_head_dim=\[5, 4, 6\] must name a divisor.*\(16, 32, 48\)"):
        UNet2D(**{**CELEBA, "attention_head_dim": [5, 4, 6]})


@torch.no_grad()
def test_what_is_attached_is_called():
    stock, ours = pair("churches")
    arguments = inputs(stock)
    wanted = stock(**arguments).sample
    names = ("down_blocks.0.attentions.0", "down_blocks.0.downsamplers.0", "up_blocks.0.upsamplers.0", "up_blocks.1")
    called = []
    for name in names:
        ours.get_submodule(name).register_forward_hook(lambda *_, name=name: called.append(name))
    assert tiny.error(ours(**arguments).sample, wanted) <= CLOSE
    assert called == list(names) and any("it has hooks" in sentence for sentence in ours.explain())


def test_saved_folder_is_stock(tmp_path):
    stock, ours = pair("inpainting")
    ours.save_pretrained(tmp_path)
    loaded = UNet2DModel.from_pretrained(tmp_path)
    assert all(torch.equal(value, stock.state_dict()[name]) for name, value in loaded.state_dict().items())
    assert type(UNet2D.from_pretrained(tmp_path)) is UNet2D


WRONG = {
    "channels": ({"sample": torch.zeros(2, 9, 8, 8)}, "9 channels; this UNet expects 3"),
    "dtype": ({"sample": torch.zeros(2, 3, 8, 8).half()}, "sample is float16"),
    "labels": ({"class_labels": torch.zeros(2).long()}, "has no class embedding"),
    "timestep": ({"timestep": torch.zeros(3)}, r"\(3,\); expected \(\) or \(2,\)"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_argument_is_refused_with_a_sentence(case):
    _, ours = pair()
    change, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        ours(**{**inputs(ours), **change})
    with pytest.raises(ValueError, match="needs 2 of them; got None"):
        pair(num_class_embeds=5)[1](**inputs(ours))


@torch.no_grad()
@pytest.mark.parametrize("timestep", [12.5, 12, torch.tensor(12.5)])
def test_a_number_as_timestep_loses_its_fraction_as_in_stock(timestep):
    stock, ours = pair()
    given = {**inputs(ours), "timestep": timestep}
    assert tiny.error(ours(**given).sample, stock(**given).sample) <= CLOSE


@torch.no_grad()
def test_an_autoencoder_with_attention_at_some_levels_goes_through_ours():
    types = {
        "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        "up_block_types": ("AttnUpDecoderBlock2D", "AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
    }
    stock = tiny.vae(**types)
    ours = AutoencoderKL.adopt(copy.deepcopy(stock))
    x = torch.randn(2, 3, 32, 32)
    assert tiny.error(ours.encode(x).latent_dist.parameters, stock.encode(x).latent_dist.parameters) <= CLOSE
    z = torch.randn(2, 4, 8, 8)
    assert tiny.error(ours.decode(z).sample, stock.decode(z).sample) <= CLOSE and ours.explain() == []
