"""Files that hold too little: said in a sentence, and at random only where that was asked for."""

from __future__ import annotations

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from test_load import small

import ldmfast
from ldmfast.released.conversion import convert

LOST = "model.diffusion_model.out.2.bias"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A released file, the folder that it converts to, and the file without one of the U-Net's tensors."""
    home = tmp_path_factory.mktemp("home")
    tensors = small()
    save_file(tensors, home / "model.safetensors")
    convert(home / "model.safetensors", home / "folder")
    torch.save({"state_dict": tensors}, home / "model.ckpt")
    save_file({name: value for name, value in tensors.items() if name != LOST}, home / "lacks.safetensors")
    return home


def options(home, part):
    return {"config": str(home / "folder"), "subfolder": part, "local_files_only": True}


CONTENT = {
    "page": (lambda content: b"<!DOCTYPE html><html>", "failed download"),
    "truncated": (lambda content: content[:-100], "truncated"),
    "half": (lambda content: content[: len(content) // 2], "truncated"),
    "empty": (lambda content: b"", "is empty; download it again"),
    "text": (lambda content: b"Not Found", "neither a torch file|has only|header|truncated"),
}


@pytest.mark.parametrize("ending", [".safetensors", ".ckpt"])
@pytest.mark.parametrize("kind", CONTENT)
@pytest.mark.parametrize("part", ["unet", "vae"])
def test_from_single_file_says_what_the_file_is(part, kind, ending, home, tmp_path):
    change, message = CONTENT[kind]
    path = tmp_path / f"model{ending}"
    path.write_bytes(change((home / f"model{ending}").read_bytes()))
    model = ldmfast.UNet if part == "unet" else ldmfast.AutoencoderKL
    with pytest.raises(ValueError, match=message) as error:
        model.from_single_file(path, **options(home, part))
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_from_single_file_takes_what_is_whole(home):
    for ending in (".safetensors", ".ckpt"):
        unet = ldmfast.UNet.from_single_file(home / f"model{ending}", **options(home, "unet"))
        assert type(unet) is ldmfast.UNet
        assert torch.equal(unet.conv_out.bias, load_file(home / "model.safetensors")[LOST])


def filled(model):
    return all(not value.is_meta and value.isfinite().all() for value in model.state_dict().values())


def test_weights_that_a_single_file_lacks(home):
    path = home / "lacks.safetensors"
    for more in ({}, {"torch_dtype": torch.bfloat16}):
        with pytest.raises(ValueError, match="lacks 1 of this UNet2DConditionModel's weights: conv_out.bias"):
            ldmfast.UNet.from_single_file(path, **more, **options(home, "unet"))
    unet = ldmfast.UNet.from_single_file(path, allow_missing=True, torch_dtype=torch.bfloat16, **options(home, "unet"))
    assert filled(unet) and {value.dtype for value in unet.parameters()} == {torch.bfloat16}
    pipe = ldmfast.load(path, allow_missing=True)
    assert filled(pipe.unet) and unet.conv_out.bias.abs().max() > 0


@pytest.mark.parametrize("kind", ["UNet", "UNet2D", "AutoencoderKL", "VQModel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_weights_that_a_folder_lacks_are_a_new_models(kind, dtype, tmp_path):
    stock = {"UNet": tiny.unet, "UNet2D": tiny.unet2d, "AutoencoderKL": tiny.vae, "VQModel": tiny.vq}[kind]()
    stock.save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    lost = [name for name in tensors if name.startswith(("conv_out.", "decoder.conv_out.", "decoder.mid_block."))]
    save_file({name: value for name, value in tensors.items() if name not in lost}, path)
    model = getattr(ldmfast, kind).from_pretrained(tmp_path, allow_missing=True, torch_dtype=dtype)
    state = model.state_dict()
    assert lost and filled(model) and all(state[name].dtype == dtype for name in lost)
    assert all(state[name].std() > 0 for name in lost if state[name].ndim > 1)
    assert all(torch.equal(state[name], value.to(dtype)) for name, value in tensors.items() if name not in lost)


def test_a_text_tower_that_lacks_weights_gets_a_new_ones(tmp_path):
    tensors = small()
    lost = [name for name in tensors if "text_model.encoder.layers.1.mlp" in name]
    save_file({name: value for name, value in tensors.items() if name not in lost}, tmp_path / "model.safetensors")
    pipe = ldmfast.load(tmp_path / "model.safetensors", allow_missing=True, dtype=None)
    assert lost and filled(pipe.conditioner.model)
