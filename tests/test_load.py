"""`ldmfast.load` and `ldmfast convert` beyond the zoo's rows: Stable Diffusion's files and folders, and bad input."""

from __future__ import annotations

import json
import math
import os

import diffusers
import pytest
import released_layout as layout
import tiny
import torch
from diffusers.loaders import single_file_utils
from PIL import Image
from safetensors.torch import load_file, save_file

import ldmfast
from ldmfast.commands import cli
from ldmfast.conditioning.classes_and_boxes import ClassEmbedder
from ldmfast.models.weight_files import shapes
from ldmfast.released import parts, single_file
from ldmfast.released.conversion import convert

SD = ((1, 2, 4, 4), (4, 2, 1))
VAE, CLIP_L = layout.autoencoder(4, 128, (1, 2, 4, 4)), layout.clip(768, 12)
OLD, FIRST = "conditioner.embedders.0.transformer.", "cond_stage_model.transformer."
XL = {"depth": (0, 2, 10), "is_linear": True, "label": 2816}
FULL = {  # name: the U-Net's table, the encoders', the published count of tensors and parameters
    "sd-v1": (layout.denoiser(4, 4, 320, *SD, context=768), layout.under(FIRST, CLIP_L), (686, 859_520_964)),
    "sd-v1-inpainting": (layout.denoiser(9, 4, 320, *SD, context=768), layout.under(FIRST, CLIP_L), (686, 859_535_364)),
    "sd-v2": (
        layout.denoiser(4, 4, 320, *SD, context=1024, is_linear=True),
        layout.under("cond_stage_model.model.", layout.openclip(1024, 24)),
        (686, 865_910_724),
    ),
    "sdxl": (
        layout.denoiser(4, 4, 320, (1, 2, 4), (4, 2), context=2048, **XL),
        layout.under(OLD, CLIP_L) | layout.under("conditioner.embedders.1.model.", layout.openclip(1280, 32)),
        (1680, 2_567_463_684),
    ),
    "sdxl-refiner": (
        layout.denoiser(4, 4, 384, *SD[:1], (4, 2), context=1280, depth=4, is_linear=True, label=2560),
        layout.under("conditioner.embedders.0.model.", layout.openclip(1280, 32)),
        None,
    ),
}


@pytest.mark.parametrize("name", FULL)
def test_full_width_keys(name):
    """Names and shapes alone: every tensor has a place, each network is complete, and the way back gives the same."""
    unet, encoders, published = FULL[name]
    assert published in (None, (len(unet), sum(map(math.prod, unet.values()))))
    table = layout.under("model.diffusion_model.", unet) | layout.under("first_stage_model.", VAE) | encoders
    model = single_file.from_released({n: torch.empty(s, device="meta") for n, s in table.items()})
    assert model.names == [name] and model.missing == []
    for part in model.parts.values():
        assert part.shapes is None or {n: tuple(v.shape) for n, v in part.tensors.items()} == part.shapes
    assert all(n.startswith(("cond_stage_model.", "conditioner.")) for n in model.rest)
    assert {n: tuple(v.shape) for n, v in parts.to_released(model).items()} == table


def small(family="sd-v1", **more):
    """A narrow Stable Diffusion in the released layout."""
    first = layout.under("first_stage_model.", layout.autoencoder(4, 32, (1, 2, 4, 4)))
    if family == "sd-v1":
        unet = layout.denoiser(4, 4, 32, *SD, context=64)
        encoders = layout.under("cond_stage_model.transformer.", layout.clip(64, 2))
    elif family == "sd-v2":
        unet = layout.denoiser(4, 4, 64, *SD, context=64, is_linear=True)
        encoders = layout.under("cond_stage_model.model.", layout.openclip(64, 3))
    else:
        xl = {"depth": (0, 2, 10), "is_linear": True, "label": 6 * 256 + 64}
        unet = layout.denoiser(4, 4, 32, (1, 2, 4), (4, 2), context=128, **xl)
        encoders = layout.under(OLD, layout.clip(64, 2))
        encoders |= layout.under("conditioner.embedders.1.model.", layout.openclip(64, 3))
    return layout.weights(layout.under("model.diffusion_model.", unet) | first | encoders | more)


@pytest.fixture(scope="module")
def sd1(tmp_path_factory):
    path = tmp_path_factory.mktemp("sd1") / "model.safetensors"
    save_file(small(), path)
    return path


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    """CLIP's tokenizer, with letters alone."""
    folder = tmp_path_factory.mktemp("tokenizer")
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    tokens = ["!", *letters, *(f"{c}</w>" for c in letters)]
    ids = {t: i for i, t in enumerate(tokens)} | {"<|startoftext|>": 49406, "<|endoftext|>": 49407}
    (folder / "vocab.json").write_text(json.dumps(ids))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return folder


def test_stable_diffusion_draws(sd1, vocabulary):
    pipe = ldmfast.load(sd1, tokenizer=vocabulary)
    pictures = pipe(["a cat", "a dog"], steps=2, seeds=3, size=(64, 64))
    assert len(pictures) == 2 and pictures[0].size == (64, 64)
    assert pipe.guidance == 7.5  # what diffusers' pipeline takes; the small models here take 3
    assert pictures[0].tobytes() != pipe("a tree", steps=2, seeds=3, size=(64, 64))[0].tobytes()


def test_the_command_line_draws_a_file_with_a_tokenizer_and_no_network(sd1, vocabulary, tmp_path, capsys):
    words = ["sample", "a (cat:1.2)", "--model", str(sd1), "--steps", "2", "--size", "64x64", "--quiet", "--scale", "1"]
    words += ["--seed", "3", "-o", str(tmp_path / "a.png")]
    assert (
        cli.main([*words, "--tokenizer", str(vocabulary / "vocab.json"), "--negative", "dog", "--clip-skip", "1"]) == 0
    )
    asked = {"negative": "dog", "clip_skip": 1, "steps": 2, "seeds": 3, "size": (64, 64)}
    wanted = ldmfast.load(sd1, tokenizer=vocabulary)("a (cat:1.2)", **asked)[0]
    assert Image.open(tmp_path / "a.png").tobytes() == wanted.tobytes()
    assert cli.main(words) == 2 and "on the command line --tokenizer" in capsys.readouterr().err


def test_without_a_tokenizer_the_prompt_says_so(sd1, tmp_path):
    pipe = ldmfast.load(sd1)
    with pytest.raises(OSError, match="could not be loaded.*tokenizer= a folder with vocab.json"):
        pipe("a cat", steps=1)
    with pytest.raises(OSError, match="name a folder with CLIP's vocab.json and merges.txt"):
        ldmfast.load(sd1, tokenizer=tmp_path)


@pytest.mark.parametrize("family", ["sd-v1", "sd-v2", "sdxl"])
@torch.no_grad()
def test_as_diffusers_own_converters(family):
    """Tensor by tensor, and the text encoder by what it computes."""
    tensors = small(family)
    model = single_file.from_released(dict(tensors))
    unet, vae = model.parts["unet"], model.parts["vae"]
    wanted = single_file_utils.convert_ldm_unet_checkpoint(dict(tensors), unet.config)
    assert wanted.keys() == unet.tensors.keys() and all(torch.equal(unet.tensors[k], v) for k, v in wanted.items())
    wanted = single_file_utils.convert_ldm_vae_checkpoint(dict(tensors), vae.config)
    assert wanted.keys() == vae.tensors.keys() and all(torch.equal(vae.tensors[k], v) for k, v in wanted.items())
    text = model.parts["text_encoder"].tensors
    if family == "sd-v1":
        assert text == single_file_utils.convert_ldm_clip_checkpoint(dict(tensors))
    elif family == "sd-v2":  # the projection goes to the rest, as the pipeline does not read it; the third layer too
        assert {k.split(".")[3] for k in text if ".layers." in k} == {"0", "1"}
        assert torch.equal(
            torch.cat([text[f"text_model.encoder.layers.1.self_attn.{n}_proj.weight"] for n in "qkv"]),
            tensors["cond_stage_model.model.transformer.resblocks.1.attn.in_proj_weight"],
        )


def test_sdxl_draws_and_round_trips(tmp_path, vocabulary):
    tensors = small("sdxl")
    save_file(tensors, tmp_path / "xl.safetensors")
    pipe = ldmfast.load(tmp_path / "xl.safetensors", tokenizer=vocabulary)
    assert type(pipe) is ldmfast.LatentDiffusionPipeline and type(pipe.unet) is ldmfast.UNet
    assert [t.pad_token_id for t in pipe.conditioner.tokenizers] == [49407, 0]  # CLIP's and OpenCLIP's
    assert pipe.conditioner.models[1].text_projection.weight.equal(
        tensors["conditioner.embedders.1.model.text_projection"].t()
    )
    pictures = pipe(["a cat", "a dog"], steps=1, size=(64, 64))
    assert pictures[0].size == (64, 64) and pictures[0].tobytes() != pictures[1].tobytes()
    convert(tmp_path / "xl.safetensors", tmp_path / "xl")
    convert(tmp_path / "xl", tmp_path / "back.safetensors")
    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() == tensors.keys() and all(torch.equal(back[k], v) for k, v in tensors.items())


def test_a_converted_folder_is_diffusers_own(sd1, tmp_path):
    assert cli.main(["convert", str(sd1), str(tmp_path / "sd")]) == 0
    unet = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "sd", subfolder="unet")
    stock = diffusers.UNet2DConditionModel.from_single_file(
        str(sd1), config=str(tmp_path / "sd"), subfolder="unet", local_files_only=True
    )
    assert all(torch.equal(value, stock.state_dict()[name]) for name, value in unet.state_dict().items())
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "sd", tokenizer=None, text_encoder=None)
    assert pipe.scheduler.config.steps_offset == 1


def write_folder(folder, unet):
    """A folder that never was a released file: with a part that has no place there, and settings beyond the shapes."""
    unet.half().save_pretrained(folder / "unet")
    vae = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = diffusers.AutoencoderKL(block_out_channels=(32, 32), norm_num_groups=32, scaling_factor=0.5, **vae)
    vae.save_pretrained(folder / "vae")
    diffusers.EulerDiscreteScheduler().save_pretrained(folder / "scheduler")
    (folder / "safety_checker").mkdir()
    (folder / "safety_checker" / "config.json").write_text("{}")
    save_file({"weight": torch.arange(3)}, folder / "safety_checker" / "model.safetensors")


@pytest.mark.parametrize("crossing", [True, False])
def test_a_folder_goes_to_a_file_and_back_with_its_configurations(crossing, tmp_path):
    blocks = {"block_out_channels": (32, 64, 64), "norm_num_groups": 32, "attention_head_dim": 16}
    plain = {
        "down_block_types": ("DownBlock2D", *["AttnDownBlock2D"] * 2),
        "up_block_types": (*["AttnUpBlock2D"] * 2, "UpBlock2D"),
        "layers_per_block": 1,
    }
    kind = diffusers.UNet2DConditionModel if crossing else diffusers.UNet2DModel
    write_folder(tmp_path / "in", kind(**{**(tiny.SD1 if crossing else plain), **blocks}))
    report = convert(tmp_path / "in", tmp_path / "one.safetensors")
    assert any("safety_checker, which the released layout has no place for" in line for line in report)
    assert "ldmfast.safety_checker/weight" in shapes(tmp_path / "one.safetensors")
    one = load_file(tmp_path / "one.safetensors")
    assert one["first_stage_model.decoder.mid.attn_1.q.weight"].shape == (32, 32, 1, 1)
    convert(tmp_path / "one.safetensors", tmp_path / "out")
    for path in (tmp_path / "in").rglob("*"):
        other = tmp_path / "out" / path.relative_to(tmp_path / "in")
        if path.suffix == ".json":
            assert json.loads(other.read_text()) == json.loads(path.read_text()), path
        elif path.suffix == ".safetensors":
            a, b = load_file(path), load_file(other)
            assert a.keys() == b.keys() and all(torch.equal(b[k], v) and b[k].dtype == v.dtype for k, v in a.items())


def test_folders_with_the_names_of_2022(tmp_path):
    """vqvae/ for vae/, and attention's query, key, value and proj_attn, as CompVis/ldm-celebahq-256 has them."""
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    unet = diffusers.UNet2DModel(block_out_channels=(32, 64), attention_head_dim=32, layers_per_block=1, **blocks)
    vae = diffusers.VQModel(block_out_channels=(32,), norm_num_groups=32)
    for name, network in (("unet", unet), ("vqvae", vae)):
        network.save_pretrained(tmp_path / "in" / name)
        path = tmp_path / "in" / name / "diffusion_pytorch_model.safetensors"
        tensors = load_file(path)
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            tensors = {n.replace(f".{new}.", f".{old}."): v for n, v in tensors.items()}
        save_file(tensors, path)
    diffusers.DDIMScheduler().save_pretrained(tmp_path / "in" / "scheduler")
    pipe = ldmfast.load(tmp_path / "in")
    for got, wanted in ((pipe.unet, unet), (pipe.vae, vae)):
        assert all(torch.equal(value, wanted.state_dict()[name]) for name, value in got.state_dict().items())
    convert(tmp_path / "in", tmp_path / "one.safetensors")
    again = ldmfast.load(tmp_path / "one.safetensors")
    assert all(torch.equal(value, vae.state_dict()[name]) for name, value in again.vae.state_dict().items())


def test_a_denoiser_without_its_encoder_or_autoencoder_asks_for_it(sd1, tmp_path):
    tensors = load_file(sd1)
    without = {n: v for n, v in tensors.items() if not n.startswith("cond_stage_model.")}
    save_file(without, tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "a")
    encoder = ClassEmbedder(10, 64)
    for denoiser in ("a.safetensors", "a"):
        with pytest.raises(ValueError, match="no encoder for what its denoiser .* give one: conditioner="):
            ldmfast.load(tmp_path / denoiser)
        assert ldmfast.load(tmp_path / denoiser, conditioner=encoder).conditioner is encoder
    save_file({n: v for n, v in without.items() if not n.startswith("first_stage_model.")}, tmp_path / "b.safetensors")
    stage = {n.removeprefix("first_stage_model."): v for n, v in without.items() if n.startswith("first_stage_model.")}
    save_file(stage, tmp_path / "stage.safetensors")
    convert(tmp_path / "b.safetensors", tmp_path / "b")
    for denoiser in ("b.safetensors", "b"):
        with pytest.raises(ValueError, match="no autoencoder; give one: autoencoder="):
            ldmfast.load(tmp_path / denoiser, conditioner=encoder)
        pipe = ldmfast.load(tmp_path / denoiser, conditioner=encoder, autoencoder=tmp_path / "stage.safetensors")
        assert torch.equal(pipe.vae.encoder.conv_in.weight, stage["encoder.conv_in.weight"])


def write_yaml(path, **unet):
    import yaml

    unet = {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": unet}
    params = {
        "linear_start": 0.001,
        "linear_end": 0.02,
        "parameterization": "v",
        "scale_factor": 0.3,
        "unet_config": unet,
    }
    path.write_text(yaml.safe_dump({"model": {"params": params}}))
    return path


def odd(ch=32):
    """A model of no released family: a level less than celeba's."""
    table = layout.under("model.diffusion_model.", layout.denoiser(3, 3, ch, (1, 2), (2,)))
    return layout.weights(table | layout.under("first_stage_model.", layout.autoencoder(3, 32, (1, 2), codebook=16)))


def test_an_unknown_family_needs_its_configuration(tmp_path):
    save_file(odd(), tmp_path / "odd.safetensors")
    with pytest.raises(
        ValueError, match=r"levels \(32, 64\).*none of the released ones.*heads cannot be read.*config="
    ):
        ldmfast.load(tmp_path / "odd.safetensors")
    pipe = ldmfast.load(tmp_path / "odd.safetensors", config=write_yaml(tmp_path / "odd.yaml", num_head_channels=16))
    assert pipe.unet.down_blocks[1].attentions[0].heads == 4 and pipe.vae.config.scaling_factor == 0.3
    config = pipe.scheduler.config
    assert (config.beta_start, config.beta_end, config.prediction_type) == (0.001, 0.02, "v_prediction")
    with pytest.raises(ValueError, match="neither the file nor its family gives the noise schedule"):
        ldmfast.load(tmp_path / "odd.safetensors", config={"unet_config": {"num_heads": 1}})


def bad(case, path, tensors):
    """Write a file that is not what it should be; returns what the error must say."""
    name = "model.diffusion_model.time_embed.0.weight"
    if case == "web page":
        path.write_text("<!DOCTYPE html><html>")
        return "failed download"
    if case == "truncated":
        save_file(tensors, path)
        path.write_bytes(path.read_bytes()[:-100])
        return "truncated.*download it again"
    if case == "lora":
        save_file({"lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight": torch.zeros(2, 2)}, path)
        return "this is a LoRA; load the base model, then pipe.load_lora_weights"
    if case == "flux":
        save_file({"model.diffusion_model.double_blocks.0.img_attn.qkv.weight": torch.zeros(2, 2)}, path)
        return r"this is a transformer \(Flux\)"
    if case == "missing":
        tensors.pop(name)
        save_file(tensors, path)
        return f"lacks 1 of this model's weights: {name}.*allow_missing=True"
    if case == "shapeless":
        tensors.pop("cond_stage_model.transformer.text_model.embeddings.position_embedding.weight")
        save_file(tensors, path)
        return "lacks text_model.embeddings.position_embedding.weight, without which"
    if case == "shape":
        save_file({**tensors, name: torch.zeros(3, 3)}, path)
        return rf"{name} has shape \(3, 3\); time_embedding.linear_1.weight is \(128, 32\)"
    if case == "code":
        torch.save({"callbacks": pytest.Item, "model": os.getcwd}, path)
        return "holds no table of tensors"
    if case == "half a zip":
        torch.save({"state_dict": tensors}, path)
        path.write_bytes(path.read_bytes()[:-4000])
        return "truncated or damaged"
    assert case == "no tensors"
    torch.save({"epoch": 3}, path)
    return "holds no table of tensors"


@pytest.mark.parametrize("case", ["web page", "truncated", "lora", "flux", "missing", "shapeless", "shape"])
def test_a_bad_safetensors_file_is_refused_in_one_sentence(case, tmp_path, sd1):
    refused(tmp_path / "model.safetensors", bad(case, tmp_path / "model.safetensors", load_file(sd1)), tmp_path)


@pytest.mark.parametrize("case", ["web page", "code", "half a zip", "no tensors"])
def test_a_bad_pickle_is_refused_in_one_sentence(case, tmp_path, sd1):
    refused(tmp_path / "model.ckpt", bad(case, tmp_path / "model.ckpt", load_file(sd1)), tmp_path)


def refused(path, message, tmp_path):
    for use in (ldmfast.load, lambda path: convert(path, tmp_path / "out")):
        with pytest.raises(ValueError, match=message) as error:
            use(path)
        assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_missing_weights_can_be_taken_at_random(sd1, tmp_path):
    tensors = load_file(sd1)
    lost = tensors.pop("model.diffusion_model.out.2.bias")
    tensors.pop("cond_stage_model.transformer.text_model.final_layer_norm.bias")
    save_file(tensors, tmp_path / "model.safetensors")
    pipe = ldmfast.load(tmp_path / "model.safetensors", allow_missing=True)
    assert pipe.unet.conv_out.bias.shape == lost.shape
    assert torch.equal(pipe.unet.conv_in.weight, tensors["model.diffusion_model.input_blocks.0.0.weight"])


def test_an_unknown_tensor_is_named_and_kept(sd1, tmp_path):
    tensors = load_file(sd1) | {"mystery.weight": torch.arange(4.0)}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.warns(UserWarning, match="1 tensors beside the model .unknown: mystery.weight"):
        ldmfast.load(tmp_path / "model.safetensors")
    report = convert(tmp_path / "model.safetensors", tmp_path / "folder")
    assert any("mystery.weight" in line for line in report)
    convert(tmp_path / "folder", tmp_path / "back.ckpt")
    back = torch.load(tmp_path / "back.ckpt", weights_only=True)["state_dict"]
    assert back.keys() == tensors.keys() and torch.equal(back["mystery.weight"], tensors["mystery.weight"])


def test_what_cannot_be_converted_is_said(sd1, tmp_path, capsys):
    for arguments, message in (
        ([sd1, tmp_path / "x.safetensors"], "one must be a folder and the other a .safetensors"),
        ([sd1, sd1.parent], "exists already"),
        ([tmp_path / "none", tmp_path / "x"], "neither a file nor a folder"),
        ([tmp_path, tmp_path / "x.ckpt"], "no diffusers folder"),
        ([sd1, tmp_path / "x", "--ema"], "holds no averaged weights"),
    ):
        assert cli.main(["convert", *map(str, arguments)]) == 2
        assert message in capsys.readouterr().err


def test_a_table_whose_length_looks_like_a_pickle(tmp_path):
    """A safetensors file begins with its table's length; 0x80 as its lowest byte is no pickle's mark."""
    for more in range(0, 256, 8):
        save_file({"x" * (8 + more): torch.zeros(1)}, tmp_path / "a.safetensors")
        if (tmp_path / "a.safetensors").read_bytes()[0] == 0x80:
            assert list(shapes(tmp_path / "a.safetensors").values()) == [(1,)]
            return
    raise AssertionError("no such length was made")
