"""Folders as diffusers and transformers have written them: today's text towers, variants, shards, .bin."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_door import stable_diffusion
from tiny_pipelines import class_conditional

import ldmfast
from ldmfast.commands import cli
from ldmfast.released.conversion import convert

UNET = "diffusion_pytorch_model"


@pytest.fixture(scope="module")
def stock():
    return stable_diffusion()


def marked(network, number):
    """The network's tensors, one of them filled with a number by which the file that they came from is known."""
    tensors = {name: value.clone() for name, value in network.state_dict().items()}
    tensors["conv_in.bias"].fill_(number)
    return tensors


def taken(folder, **options):
    return ldmfast.load(folder, **options).unet.conv_in.bias[0].item()


def write(tensors, path):
    if path.suffix == ".bin":
        torch.save(tensors, path)
    else:
        save_file(tensors, path, {"format": "pt"})


@pytest.fixture
def folder(stock, tmp_path):
    """A pipeline whose U-Net has no weights yet."""
    stock.save_pretrained(tmp_path / "pipe")
    (tmp_path / "pipe" / "unet" / f"{UNET}.safetensors").unlink()
    return tmp_path / "pipe"


@pytest.mark.parametrize("names", ["with text_model.", "without text_model."])
@pytest.mark.parametrize("ending", [".safetensors", ".bin"])
def test_text_towers_by_the_names_of_any_transformers(names, ending, stock, tmp_path):
    stock.save_pretrained(tmp_path / "pipe")
    (file,) = (tmp_path / "pipe" / "text_encoder").glob("*.safetensors")
    tensors = {name.removeprefix("text_model."): value for name, value in load_file(file).items()}
    file.unlink()
    prefix = "text_model." if names.startswith("with ") else ""
    stem = "model" if ending == ".safetensors" else "pytorch_model"
    write({prefix + name: value for name, value in tensors.items()}, file.with_name(stem + ending))
    pipe = ldmfast.load(tmp_path / "pipe")
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(pipe.conditioner.model(ids)[0], stock.text_encoder(ids)[0])
    convert(tmp_path / "pipe", tmp_path / "one.safetensors")
    place = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
    assert place in load_file(tmp_path / "one.safetensors")
    picture = tmp_path / "a.png"
    options = ["--steps", "1", "--size", "32", "-o", str(picture), "--quiet"]
    assert cli.main(["sample", "a", "--model", str(tmp_path / "pipe"), *options]) == 0 and picture.is_file()


def test_a_projecting_tower_as_transformers_saves_it(stock, tmp_path):
    config = transformers.CLIPTextConfig(**{**stock.text_encoder.config.to_dict(), "projection_dim": 16})
    tower = transformers.CLIPTextModelWithProjection(config).eval()
    two = {"text_encoder_2": tower, "text_encoder": stock.text_encoder}
    for name, each in two.items():
        each.save_pretrained(tmp_path / "pipe" / name)
    xl = {"cross_attention_dim": 64, "projection_class_embeddings_input_dim": 6 * 8 + 16, "sample_size": 8}
    for name, each in {"unet": tiny.unet("sdxl", **xl), "vae": stock.vae, "scheduler": stock.scheduler}.items():
        each.save_pretrained(tmp_path / "pipe" / name)
    ids = torch.tensor([[3, 4, 5]])
    got = ldmfast.load(tmp_path / "pipe").conditioner.models[1]
    assert torch.equal(got(ids).text_embeds, tower(ids).text_embeds)


@pytest.mark.parametrize("ending", [".safetensors", ".bin"])
@pytest.mark.parametrize("shards", [False, True])
def test_one_variant_alone_is_taken_by_itself_and_by_name(ending, shards, folder, stock):
    sizes = {"max_shard_size": "200KB"} if shards else {}
    stock.unet.save_pretrained(folder / "unet", variant="fp16", safe_serialization=ending == ".safetensors", **sizes)
    assert (len(list((folder / "unet").glob(f"*{ending}"))) > 2) == shards
    for options in ({}, {"variant": "fp16"}):
        unet = ldmfast.load(folder, **options).unet
        assert all(torch.equal(value, stock.unet.state_dict()[name]) for name, value in unet.state_dict().items())
    with pytest.raises(ValueError, match="no weights of the variant 'ema'; its variants: fp16"):
        ldmfast.load(folder, variant="ema")


def test_variants_side_by_side(folder, stock, tmp_path):
    for number, name in ((1, "fp16.safetensors"), (2, "non_ema.safetensors"), (3, "fp16.bin")):
        write(marked(stock.unet, number), folder / "unet" / f"{UNET}.{name}")
    with pytest.raises(ValueError, match=r"variants fp16, non_ema alone; name one: variant='fp16' \(--variant fp16\)"):
        ldmfast.load(folder)
    assert taken(folder, variant="fp16") == 1 and taken(folder, variant="non_ema") == 2
    write(marked(stock.unet, 4), folder / "unet" / f"{UNET}.bin")
    assert taken(folder) == 4 and taken(folder, variant="non_ema") == 2
    convert(folder, tmp_path / "one.safetensors", variant="non_ema")
    bias = load_file(tmp_path / "one.safetensors")["model.diffusion_model.input_blocks.0.0.bias"]
    assert bias[0] == 2
    assert cli.main(["convert", str(folder), str(tmp_path / "two.ckpt"), "--variant", "fp16"]) == 0
    picture = str(tmp_path / "a.png")
    options = ["--steps", "1", "--size", "32", "-o", picture, "--quiet"]
    assert cli.main(["sample", "a", "--model", str(folder), "--variant", "non_ema", *options]) == 0
    assert cli.main(["sample", "a", "--model", str(folder), "--variant", "ema", *options]) == 2


def test_shards_by_every_name(folder, stock):
    """The variant before the numbers, as today; behind them, as in 2023; an index that is lost."""
    halves = [dict(list(marked(stock.unet, 5).items())[i::2]) for i in range(2)]
    for middle in ("{n}.fp16", ".fp16{n}"):
        files = [f"{UNET}{middle.format(n=f'-0000{i}-of-00002')}.safetensors" for i in (1, 2)]
        for file, half in zip(files, halves, strict=True):
            write(half, folder / "unet" / file)
        assert taken(folder) == 5 and taken(folder, variant="fp16") == 5
        index = {"weight_map": {name: file for file, half in zip(files, halves, strict=True) for name in half}}
        (folder / "unet" / f"{UNET}.safetensors.index.fp16.json").write_text(json.dumps(index))
        assert taken(folder) == 5
        (folder / "unet" / files[0]).unlink()
        with pytest.raises(FileNotFoundError, match="00001-of-00002"):
            ldmfast.load(folder)
        for path in (folder / "unet").glob(f"{UNET}*"):
            path.unlink()


def test_a_folder_of_ours_has_variants_too(tmp_path):
    class_conditional().save_pretrained(tmp_path)
    plain = tmp_path / "unet" / f"{UNET}.safetensors"
    tensors = load_file(plain)
    write(
        {**tensors, "conv_in.bias": torch.full_like(tensors["conv_in.bias"], 6)},
        plain.with_name(f"{UNET}.ema.safetensors"),
    )
    assert taken(tmp_path, variant="ema") == 6 and taken(tmp_path) != 6
    plain.unlink()
    assert taken(tmp_path) == 6
    with pytest.raises(ValueError, match="no weights of the variant 'fp16'; its variants: ema"):
        ldmfast.load(tmp_path, variant="fp16")


def test_a_damaged_variant_is_nobody_elses_matter(stock, tmp_path):
    stock.unet.save_pretrained(tmp_path)
    (tmp_path / f"{UNET}.fp16.safetensors").write_bytes(b"<html>")
    assert type(ldmfast.UNet.from_pretrained(tmp_path)) is ldmfast.UNet
    with pytest.raises(ValueError, match="failed download"):
        ldmfast.UNet.from_pretrained(tmp_path, variant="fp16")


def test_a_variant_of_a_file_is_refused(tmp_path):
    write({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="variant='fp16' is for a folder"):
        ldmfast.load(tmp_path / "a.safetensors", variant="fp16")
