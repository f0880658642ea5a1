"""LoRA finetuning of a saved pipeline: it learns, it resumes, diffusers and `load_lora` read what it writes."""

from __future__ import annotations

import dataclasses

import diffusers
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from tiny import CUTOUTS

from ldmfast.commands import cli
from ldmfast.conditioning.text import TextEncoder
from ldmfast.data import emoji
from ldmfast.diffusion.schedule import make_scheduler
from ldmfast.models import AutoencoderKL, UNet
from ldmfast.models.lora import NAME, add_lora
from ldmfast.pipeline import LatentDiffusionPipeline, TextToImagePipeline
from ldmfast.pipeline.load_lora import load_lora
from ldmfast.training import checkpoint, train_denoiser, train_lora
from ldmfast.training.config import DenoiserConfig, LoraConfig

CONFIG = LoraConfig(steps=12, batch=4, rank=2, alpha=3.0, warmup=1, save_every=6, log_every=6, precision="fp32")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A saved pipeline with random weights, and a collection to finetune it on."""
    home = tmp_path_factory.mktemp("lora")
    emoji.build({"lemon": emoji.folder_cutouts(CUTOUTS)["lemon"]}, home / "pictures", size=16, count=1)
    shape = DenoiserConfig(channels=(16, 32), attention=(0, 1), groups=8, head_width=16)
    vae = AutoencoderKL.from_config({**tiny.vae().config, "sample_size": 16})
    unet = train_denoiser.build(shape, 4, 4, 384)
    pipeline = TextToImagePipeline(unet, vae, make_scheduler(0.0015, 0.0195), TextEncoder.from_pretrained())
    pipeline.save_pretrained(home / "model")
    return home


@pytest.fixture(scope="module")
def trained(home):
    train_lora.train(home / "pictures", home / "model", home / "run", CONFIG, quiet=True)
    return home / "run"


def unet_of(home):
    return UNet.from_pretrained(home / "model" / "unet")


def predicted(unet):
    generator = torch.Generator().manual_seed(0)
    x, context = torch.randn(2, 4, 4, 4, generator=generator), torch.randn(2, 5, 384, generator=generator)
    with torch.no_grad():
        return unet(x, torch.tensor([10, 700]), encoder_hidden_states=context).sample


def test_every_target_must_name_a_layer():
    unet = tiny.unet()
    with pytest.raises(ValueError, match="no layer of this U-Net has a name that ends in 'to_kk'"):
        add_lora(unet, 2, 2, ["to_q", "to_kk"])
    assert all(p.requires_grad for p in unet.parameters())  # nothing was changed
    add_lora(unet, 2, 2, ["to_q", " to_k"])
    adapted = [name.partition(".lora_")[0] for name in unet.state_dict() if ".lora_" in name]
    assert {name.rpartition(".")[2] for name in adapted} == {"to_q", "to_k"}


def test_diffusers_reads_the_file_as_we_do(home, trained):
    ours, stock = unet_of(home), diffusers.UNet2DConditionModel.from_pretrained(home / "model" / "unet")
    plain = predicted(ours)
    load_lora(ours, trained)
    stock.load_lora_adapter(trained, weight_name=NAME, prefix="unet")
    assert tiny.error(predicted(ours), plain) > 1e-4  # it does something
    assert tiny.error(predicted(ours), predicted(stock)) < 1e-5
    keys = load_file(trained / NAME)
    assert all(key.startswith("unet.") for key in keys) and all(value.isfinite().all() for value in keys.values())


def test_the_scale_counts_and_nought_changes_nothing(home, trained):
    unet, plain = unet_of(home), predicted(unet_of(home))
    load_lora(unet, (trained, 0.0))
    assert tiny.error(predicted(unet), plain) < 1e-6
    twice, once = unet_of(home), unet_of(home)
    load_lora(once, trained)
    load_lora(twice, (trained, 0.5), (trained, 0.5))
    assert tiny.error(predicted(twice), predicted(once)) < 1e-5


def test_only_the_lora_is_kept(trained):
    state = checkpoint.load(trained / "lora.pt")
    assert state["model"] and all("lora" in name for name in state["model"])
    assert {tensor.shape for tensor in state["ema"]["shadow_params"]} == {v.shape for v in state["model"].values()}


def test_a_stopped_finetuning_resumes_bit_for_bit(home, trained, tmp_path, monkeypatch):
    real = train_lora.loss_of

    def stopping(*args, **kwargs):
        step = real(*args, **kwargs)

        def interrupted(s):
            if s.number == 7:
                raise KeyboardInterrupt
            return step(s)

        return interrupted

    monkeypatch.setattr(train_lora, "loss_of", stopping)
    with pytest.raises(KeyboardInterrupt):
        train_lora.train(home / "pictures", home / "model", tmp_path, CONFIG, quiet=True)
    monkeypatch.undo()
    train_lora.train(home / "pictures", home / "model", tmp_path, CONFIG, quiet=True)
    whole, parts = load_file(trained / NAME), load_file(tmp_path / NAME)
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)


def test_it_learns(home, tmp_path):
    longer = dataclasses.replace(CONFIG, steps=45, log_every=15, save_every=45, learning_rate=1e-2, rank=4)
    history = train_lora.train(home / "pictures", home / "model", tmp_path, longer, quiet=True)
    assert history[-1][1] < 0.97 * history[0][1]


def test_another_networks_lora_is_refused(home, trained, tmp_path):
    with pytest.raises(FileNotFoundError, match="no LoRA file"):
        load_lora(unet_of(home), tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="does not fit this U-Net"):
        load_lora(UNet.from_config(tiny.unet().config), trained)
    other = tmp_path / "other.safetensors"
    save_file({"conv.weight": torch.zeros(2)}, other)
    with pytest.raises(ValueError, match="holds no LoRA of a U-Net.*conv.weight"):
        load_lora(unet_of(home), other)
    other.write_bytes(b"<html>")
    with pytest.raises(ValueError, match="a failed download"):
        load_lora(unet_of(home), other)


def test_a_model_that_takes_no_caption_is_refused(home, tmp_path):
    shape = DenoiserConfig(channels=(16, 32), attention=(0, 1), groups=8, head_width=16)
    vae = AutoencoderKL.from_pretrained(home / "model" / "vae")
    unet = train_denoiser.build(shape, 4, 4, None)
    LatentDiffusionPipeline(unet, vae, make_scheduler(0.0015, 0.0195)).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="conditioned on what Unconditional takes"):
        train_lora.train(home / "pictures", tmp_path / "model", tmp_path, CONFIG, quiet=True)


def test_the_command(home, tmp_path, capsys):
    options = ["--steps", "2", "--batch", "2", "--rank", "1", "--warmup", "0", "--precision", "fp32", "--quiet"]
    where = ["--data", str(home / "pictures"), "--model", str(home / "model"), "--output", str(tmp_path)]
    assert cli.main(["train", "lora", *where, *options]) == 0
    assert (tmp_path / NAME).is_file() and NAME in capsys.readouterr().out
    sample = ["sample", "a lemon", "--model", str(home / "model"), "--steps", "1", "--quiet", "-o"]
    drawn = {}
    for name, scale in (("plain", []), ("with", ["--lora", f"{tmp_path}:40"])):
        assert cli.main([*sample, str(tmp_path / f"{name}.png"), *scale]) == 0
        drawn[name] = (tmp_path / f"{name}.png").read_bytes()
    assert drawn["plain"] != drawn["with"]
