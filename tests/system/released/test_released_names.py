"""Released single files by whatever names tools have left in them."""

from __future__ import annotations

import warnings

import pytest
import torch
from saved_files import STAGE, UNET, equal, saved
from test_load import small

import ldmfast
from ldmfast.released.conversion import convert
from ldmfast.released.parts import ema_name
from ldmfast.released.spellings import dotted
from ldmfast.released.weights import read_weights


@pytest.fixture(scope="module")
def sd1():
    return small()


def clip_bare(name):
    return name.replace("transformer.text_model.", "transformer.")


def wrapped(*segments):
    """Something in a name, and what stands there in the tool's."""
    return lambda name: name.replace(*segments) if segments[0] else segments[1] + name


SPELLINGS = {
    "CLIP without text_model.": clip_bare,
    "DDP": wrapped("", "module."),
    "torch.compile of all": wrapped("", "_orig_mod."),
    "torch.compile of the U-Net": wrapped(UNET, UNET + "_orig_mod."),
    "DDP of the U-Net": wrapped("model.diffusion_model.", "model.diffusion_model.module."),
    "both": wrapped("", "module._orig_mod."),
    "inside of another model": wrapped("", "ldm.inner."),
    "all of it": lambda name: "module.net._orig_mod." + clip_bare(name),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_names_as_tools_leave_them(spelling, sd1, tmp_path):
    path = saved({SPELLINGS[spelling](name): value for name, value in sd1.items()}, tmp_path / "file.ckpt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe = ldmfast.load(path, config={"parameterization": "eps"})
    assert torch.equal(pipe.unet.conv_in.weight, sd1[UNET + "input_blocks.0.0.weight"])
    assert torch.equal(pipe.vae.encoder.conv_in.weight, sd1[STAGE + "encoder.conv_in.weight"])
    report = convert(path, tmp_path / "folder")
    assert any(line.split()[1:3] == ["names", "read"] for line in report)


@pytest.mark.parametrize("prefix", [STAGE, "vae.", "module.first_stage_model.", "autoencoder.model."])
def test_a_first_stage_with_its_prefix(prefix, sd1, tmp_path):
    stage = {name.removeprefix(STAGE): value for name, value in sd1.items() if name.startswith(STAGE)}
    vae = ldmfast.load(saved({prefix + name: value for name, value in stage.items()}, tmp_path / "vae.safetensors"))
    assert type(vae) is ldmfast.AutoencoderKL
    assert torch.equal(vae.decoder.conv_out.weight, stage["decoder.conv_out.weight"])


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "unet."])
def test_a_denoiser_under_another_prefix(prefix, sd1, tmp_path):
    own = {prefix + name.removeprefix(UNET): value for name, value in sd1.items() if name.startswith(UNET)}
    stage = {name: value for name, value in sd1.items() if name.startswith(STAGE)}
    pipe = ldmfast.load(
        saved(own, tmp_path / "unet.pt"),
        autoencoder=saved(stage, tmp_path / "vae.pt"),
        conditioner=ldmfast.load(saved(sd1, tmp_path / "whole.pt")).conditioner,
    )
    assert torch.equal(pipe.unet.conv_out.bias, sd1[UNET + "out.2.bias"])


def test_averaged_weights_alone(sd1, tmp_path):
    plain = [name for name in sd1 if name.startswith(UNET)]
    assert all(dotted(ema_name(name)) == name for name in plain)
    assert dotted("model_ema.decay") is None and dotted("model_ema.diffusion_modelmystery") is None
    tensors = {ema_name(name) if name.startswith(UNET) else name: value for name, value in sd1.items()}
    path = saved(tensors | {"model_ema.num_updates": torch.tensor(3)}, tmp_path / "ema.safetensors")
    unet = ldmfast.load(path, ema=True).unet
    assert torch.equal(unet.conv_out.bias, sd1[UNET + "out.2.bias"])
    with pytest.raises(ValueError, match="averaged weights of a denoiser alone.*ema=True"):
        ldmfast.load(path)


def test_averaged_names_of_every_released_build():
    import test_load

    for unet, *_ in test_load.FULL.values():
        assert all(dotted(ema_name(UNET + name)) == UNET + name for name in unet)


def test_safetensors_under_another_ending(sd1, tmp_path):
    path = saved(sd1, tmp_path / "file.safetensors")
    for ending in (".ckpt", ".pt", ""):
        other = path.rename(tmp_path / f"other{ending}")
        assert equal(read_weights(other)[0], sd1)
        path = other
