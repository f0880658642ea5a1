"""One door: a shipped name, a folder and a file by `ldmfast.load`, `from_pretrained` and `--model` alike."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import test_zoo as zoo
import tiny
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_pipelines import class_conditional

import ldmfast
from ldmfast import files, shipped
from ldmfast.commands import cli
from ldmfast.diffusion import catalogue
from ldmfast.diffusion.samplers import make_sampler
from ldmfast.pipeline import LatentDiffusionPipeline, TextToImagePipeline
from ldmfast.pipeline.optimize import optimize

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # numpy's, about diffusers
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
PROMPT, SIZE = "a cat", (32, 32)


def pixels(picture):
    return np.asarray(picture).astype(int)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder of ours, and a released file."""
    home = tmp_path_factory.mktemp("models")
    class_conditional().save_pretrained(home / "ours")
    torch.manual_seed(0)
    zoo.write(zoo.checkpoint(zoo.DENOISERS["celeba256"]()), home / "faces.safetensors")
    stable_diffusion().save_pretrained(home / "stock")
    return home


def stable_diffusion(scheduler=None):
    """diffusers' own pipeline, tiny, of random weights, its tokenizer one of letters."""
    torch.manual_seed(7)
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    words = ["!", *letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = transformers.CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[])
    tokenizer.model_max_length = 7
    text = transformers.CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=7,
        bos_token_id=len(words) - 2,
        eos_token_id=len(words) - 1,
    )
    pipe = diffusers.StableDiffusionPipeline(
        tiny.vae(),
        transformers.CLIPTextModel(text).eval(),
        tokenizer,
        tiny.unet(sample_size=8),
        scheduler or diffusers.PNDMScheduler(skip_prk_steps=True, **SD),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize(
    ("source", "asked", "said"),
    [
        ("emoji320", PROMPT, [PROMPT]),
        ("scenes64", {"class": "cat"}, ["--class", "cat"]),
        ("{home}/ours", 1, ["--class", "1"]),
        ("{home}/stock", PROMPT, [PROMPT]),
        ("{home}/faces.safetensors", None, []),
    ],
    ids=["shipped text", "shipped scenes", "a folder of ours", "a diffusers folder", "a file"],
)
def test_by_every_door_the_same_class_and_the_same_picture(home, tmp_path, source, asked, said):
    source = source.format(home=home)
    pipes = [ldmfast.load(source), LatentDiffusionPipeline.from_pretrained(source)]
    out = tmp_path / "a.png"
    size = None if source == "scenes64" else SIZE  # whose boxes are on a grid of one size
    options = ["--steps", "2", "--seed", "3", "--scale", "1", "--quiet", *(["--size", "32x32"] if size else [])]
    assert cli.main(["sample", *said, "--model", source, "-o", str(out), *options]) == 0
    drawn = [pixels(pipe(asked, steps=2, seeds=3, size=size)[0]) for pipe in pipes] + [pixels(Image.open(out))]
    assert [type(pipe) for pipe in pipes] == [LatentDiffusionPipeline] * 2
    assert all((other == drawn[0]).all() for other in drawn[1:])


def test_the_text_model_is_the_default_and_a_subclass_stays_one():
    pipe = TextToImagePipeline.from_pretrained()
    assert type(pipe) is TextToImagePipeline and pipe.encoder is pipe.conditioner
    assert torch.equal(pipe.unet.conv_in.weight, ldmfast.load("emoji320").unet.conv_in.weight)


SCHEDULERS = [
    diffusers.PNDMScheduler(skip_prk_steps=True, **SD),
    diffusers.PNDMScheduler(skip_prk_steps=True, prediction_type="v_prediction", **SD),
    diffusers.DDPMScheduler(clip_sample=False, **SD),
    diffusers.DDIMScheduler(clip_sample=False, **SD),
    diffusers.EulerDiscreteScheduler(**SD),
]


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=["pndm", "pndm v", "ddpm", "ddim", "euler"])
def test_a_diffusers_folder_steps_with_our_scheduler_and_draws_diffusers_picture(tmp_path, scheduler):
    stock = stable_diffusion(scheduler)
    stock.save_pretrained(tmp_path)
    ours = ldmfast.load(tmp_path)
    assert type(ours.scheduler) is catalogue.SCHEDULERS.get(type(scheduler).__name__, type(scheduler))
    settings = {"num_inference_steps": 5, "guidance_scale": 7.5, "height": 32, "width": 32}
    wanted = pixels(stock(PROMPT, generator=torch.Generator().manual_seed(5), **settings).images[0])
    got = pixels(ours(PROMPT, steps=5, seeds=5, size=SIZE)[0])
    assert np.abs(got - wanted).max() <= 2
    if type(scheduler).__name__ in catalogue.SCHEDULERS:
        taken = optimize(stock)
        assert type(taken.scheduler) is type(ours.scheduler) and type(taken.unet) is ldmfast.UNet
        again = pixels(taken(PROMPT, generator=torch.Generator().manual_seed(5), **settings).images[0])
        assert np.abs(again - wanted).max() <= 2


@pytest.mark.filterwarnings("ignore:The configuration file of this scheduler:FutureWarning")
@pytest.mark.parametrize("kind", ["PNDMScheduler", "DDPMScheduler", "DDIMScheduler"])
def test_an_old_configuration_of_stable_diffusion_is_mended_as_diffusers_does(tmp_path, kind):
    """Without clip_sample and steps_offset, whose defaults are for pixels: diffusers' pipeline sets them."""
    betas = {name: value for name, value in SD.items() if name != "steps_offset"}
    stable_diffusion(getattr(diffusers, kind)(**betas)).save_pretrained(tmp_path)
    config = {"_class_name": kind, **betas, "skip_prk_steps": True}
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    stock = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path)
    stock.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 5, "guidance_scale": 7.5, "height": 32, "width": 32}
    wanted = pixels(stock(PROMPT, generator=torch.Generator().manual_seed(5), **settings).images[0])
    assert np.abs(pixels(ldmfast.load(tmp_path)(PROMPT, steps=5, seeds=5, size=SIZE)[0]) - wanted).max() <= 2
    taken = optimize(stock)
    assert type(taken.scheduler) is catalogue.SCHEDULERS[kind]
    again = pixels(taken(PROMPT, generator=torch.Generator().manual_seed(5), **settings).images[0])
    assert np.abs(again - wanted).max() <= 2


@pytest.mark.parametrize("other", [None, "a name", torch.nn.Linear(2, 2), class_conditional()])
def test_optimize_takes_a_pipeline_of_diffusers(other):
    with pytest.raises(TypeError, match=f"optimize takes a pipeline of diffusers'; got {type(other).__name__}"):
        optimize(other)


def test_a_pipeline_of_ours_keeps_how_its_plms_extrapolates(tmp_path):
    """A model that predicts v, saved with our PLMS: loaded it draws the same picture, extrapolating in epsilon."""
    pipe = class_conditional()
    pipe.scheduler = make_sampler("plms", diffusers.DDIMScheduler(prediction_type="v_prediction", **SD))
    pipe.save_pretrained(tmp_path)
    again = ldmfast.load(tmp_path)
    assert again.scheduler.history == "epsilon"
    assert (pixels(pipe([1], steps=4)[0]) == pixels(again([1], steps=4)[0])).all()


def test_what_is_not_there_is_answered_with_the_models_that_ship(tmp_path, capsys):
    source = str(tmp_path / "none")
    for door in (ldmfast.load, LatentDiffusionPipeline.from_pretrained):
        with pytest.raises(FileNotFoundError, match="none is neither .* the models that ship are emoji320, scenes64"):
            door(source)
    assert cli.main(["sample", PROMPT, "--model", source, "-o", str(tmp_path / "a.png")]) == 2
    assert "the models that ship are emoji320, scenes64" in capsys.readouterr().err


def test_what_is_no_pipeline_of_ours_is_loaded_and_said(home, tmp_path, capsys):
    source = str(home / "stock" / "vae")
    assert type(ldmfast.load(source)) is ldmfast.AutoencoderKL
    with pytest.raises(ValueError, match=r"vae is a AutoencoderKL, no LatentDiffusionPipeline; .* ldmfast.load\("):
        LatentDiffusionPipeline.from_pretrained(source)
    assert cli.main(["sample", PROMPT, "--model", source, "-o", str(tmp_path / "a.png")]) == 2
    assert "no LatentDiffusionPipeline" in capsys.readouterr().err


def test_an_autoencoder_out_of_a_whole_model(home, tmp_path):
    stock = stable_diffusion()
    for name in ("unet", "scheduler", "text_encoder", "tokenizer"):
        getattr(stock, name).save_pretrained(tmp_path / name)
    with pytest.raises(ValueError, match="has no autoencoder; give one: autoencoder="):
        ldmfast.load(tmp_path)
    pipe = ldmfast.load(tmp_path, autoencoder=home / "stock")
    assert torch.equal(pipe.vae.encoder.conv_in.weight, stock.vae.encoder.conv_in.weight)
    with pytest.raises(ValueError, match="autoencoder=.*unet' is a UNet, not an autoencoder"):
        ldmfast.load(tmp_path, autoencoder=home / "stock" / "unet")


def test_a_text_encoder_for_a_denoiser_without_one(home, tmp_path):
    stock = stable_diffusion()
    for name in ("unet", "scheduler", "vae"):
        getattr(stock, name).save_pretrained(tmp_path / name)
    with pytest.raises(ValueError, match="has no encoder .* conditioner= or text_encoder="):
        ldmfast.load(tmp_path)
    encoder = str(home / "stock")
    got = ldmfast.load(tmp_path, text_encoder=encoder)(PROMPT, steps=2, guidance=7.5, size=SIZE)
    assert (pixels(got[0]) == pixels(ldmfast.load(encoder)(PROMPT, steps=2, size=SIZE)[0])).all()
    with pytest.raises(ValueError, match="but .*stock has an encoder of its own"):
        ldmfast.load(encoder, text_encoder=encoder)
    with pytest.raises(ValueError, match="text_encoder=.* and conditioner were both given"):
        ldmfast.load(tmp_path, text_encoder=encoder, conditioner=ldmfast.load(encoder).conditioner)


@pytest.mark.parametrize("prefix", ["text_model.", ""])
def test_a_text_tower_under_either_of_transformers_names(home, tmp_path, prefix):
    """Published folders have the prefix; transformers 5 saves without."""
    shutil.copytree(home / "stock", tmp_path / "model")
    path = tmp_path / "model" / "text_encoder" / "model.safetensors"
    tensors = {prefix + name.removeprefix("text_model."): value for name, value in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    states = [ldmfast.load(folder).conditioner([PROMPT]).context for folder in (home / "stock", tmp_path / "model")]
    assert torch.equal(*states)


def test_a_folder_that_a_kill_left_under_another_name_is_found(home, tmp_path):
    folder = tmp_path / "model"
    class_conditional().save_pretrained(folder)
    os.replace(folder, files._old(folder))
    assert type(ldmfast.load(folder).unet) is ldmfast.UNet and folder.is_dir()


def test_a_folder_that_calls_its_autoencoder_a_first_stage_still_loads(home, tmp_path):
    """As ldmfast.json was written before."""
    class_conditional().save_pretrained(tmp_path)
    path = tmp_path / "ldmfast.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({"first_stage": settings.pop("autoencoder"), **settings}))
    wanted, got = (pixels(ldmfast.load(folder)([1], steps=2)[0]) for folder in (home / "ours", tmp_path))
    assert (wanted == got).all()


def test_what_is_no_network_or_scheduler_is_refused():
    with pytest.raises(ValueError, match="a SD3Transformer2DModel has no place .* expected one of UNet2D"):
        catalogue.network("SD3Transformer2DModel")
    for name in ("AutoencoderKL", "None", "__version__"):
        with pytest.raises(ValueError, match=f"{name} is not a scheduler"):
            catalogue.scheduler(name)


DAMAGED = {  # what stands in the file; the words of the sentence
    "half of it": (lambda text: text[: len(text) // 2].encode(), "{file} is not JSON"),
    "a list": (lambda text: b"[1]", "{file} holds a list, expected a JSON object"),
    "no text": (lambda text: b"\xff\xfe\x00", "{file} is not JSON"),
    "an unknown class": (lambda text: b'{"_class_name": "Odd"}', "{part}.*Odd"),
}


@pytest.mark.parametrize("damage", DAMAGED)
@pytest.mark.parametrize("file", ["unet/config.json", "vae/config.json", "scheduler/scheduler_config.json"])
@pytest.mark.parametrize("kind", ["ours", "stock"])
def test_a_damaged_configuration_is_named(home, tmp_path, kind, file, damage):
    change, words = DAMAGED[damage]
    shutil.copytree(home / kind, tmp_path / "model")
    path = tmp_path / "model" / file
    path.write_bytes(change(path.read_text()))
    part = tmp_path / "model" if file.startswith("scheduler") else path.parent
    with pytest.raises(ValueError, match=words.format(file=path, part=part)):
        ldmfast.load(tmp_path / "model")


@pytest.mark.parametrize("file", ["ldmfast.json", "conditioner/config.json"])
def test_a_damaged_file_of_ours_is_named(home, tmp_path, file):
    shutil.copytree(home / "ours", tmp_path / "model")
    (tmp_path / "model" / file).write_text("{")
    with pytest.raises(ValueError, match=f"{tmp_path / 'model' / file} is not JSON"):
        ldmfast.load(tmp_path / "model")


def test_a_conditioner_takes_the_place_of_the_saved_one_and_of_nothing_else(home, tmp_path):
    pipe = ldmfast.load(home / "ours")
    pipe.guidance = 9.0
    pipe.save_pretrained(tmp_path)
    again = ldmfast.load(tmp_path, conditioner=pipe.conditioner)
    assert again.conditioner is pipe.conditioner and again.guidance == 9.0
    assert (pixels(again([1], steps=2)[0]) == pixels(pipe([1], steps=2)[0])).all()


def test_a_text_encoder_is_no_model(home):
    with pytest.raises(ValueError, match="text_encoder/config.json could not be used: a None has no place"):
        ldmfast.load(home / "stock" / "text_encoder")


@pytest.mark.parametrize(
    ("source", "options", "words"),
    [
        (None, {}, "the model is None, expected the name of one that ships, a folder or a file"),
        (b"ours", {}, "the model is b'ours'"),
        ("", {}, "the model is an empty name"),
        ("/", {}, "/ is no diffusers folder"),
        ("{home}/ours", {"dtype": "bfloat16"}, "dtype='bfloat16', expected a floating type of torch"),
        ("{home}/stock", {"dtype": torch.int8}, "dtype=torch.int8, expected a floating type"),
        ("{home}/stock", {"autoencoder": "{home}/stock/vae"}, "autoencoder=.* has an autoencoder of its own"),
        ("{home}/stock/vae", {"text_encoder": "minilm"}, "text_encoder='minilm', but .* alone"),
        ("{home}/ours", {"conditioner": "stock"}, "conditioner='stock', expected a Conditioner"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(home, source, options, words):
    options = {name: value.format(home=home) if isinstance(value, str) else value for name, value in options.items()}
    source = source.format(home=home) if isinstance(source, str) else source
    with pytest.raises((TypeError, ValueError, FileNotFoundError), match=words):
        ldmfast.load(source, **options)


def test_the_default_is_the_shipped_model_whatever_the_working_directory_holds(tmp_path, monkeypatch, capsys):
    for name in ("emoji320", "scenes64"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    wanted = LatentDiffusionPipeline.from_pretrained(shipped.ASSETS / shipped.TEXT)
    assert torch.equal(LatentDiffusionPipeline.from_pretrained().unet.conv_in.weight, wanted.unet.conv_in.weight)
    options = ["-o", "a.png", "--steps", "1", "--quiet"]
    assert cli.main(["sample", PROMPT, *options]) == 0 == cli.main(["sample", "--class", "cat", *options])
    assert cli.main(["sample", PROMPT, "--model", "", *options]) == 2
    assert "the model is an empty name" in capsys.readouterr().err


def test_an_encoder_named_by_a_relative_path_is_found_from_elsewhere(home, tmp_path, monkeypatch):
    monkeypatch.chdir(home)
    wanted = ldmfast.load("stock")
    wanted.save_pretrained(tmp_path / "all of it")
    stock = stable_diffusion()
    for name in ("unet", "scheduler", "vae"):
        getattr(stock, name).save_pretrained(tmp_path / "without" / name)
    ldmfast.load(tmp_path / "without", text_encoder=Path("stock")).save_pretrained(tmp_path / "named")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "minilm").mkdir()  # which is no name of a folder
    assert ldmfast.load("emoji320").conditioner.settings["name"] == "minilm"
    context = wanted.conditioner([PROMPT]).context
    for name in ("all of it", "named"):
        assert torch.equal(ldmfast.load(name).conditioner([PROMPT]).context, context)
