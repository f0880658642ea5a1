"""What the denoiser's training offers beside the loop: kept latents, measured scaling, joint encoders, reports."""

from __future__ import annotations

import dataclasses
import sys

import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from tiny import CUTOUTS

from ldmfast.conditioning.classes_and_boxes import ClassEmbedder
from ldmfast.data import emoji
from ldmfast.data.collection import load_pictures
from ldmfast.evaluation import autoencoders
from ldmfast.pipeline import LatentDiffusionPipeline, saved_autoencoder
from ldmfast.training import (
    checkpoint,
    condition_sources,
    latents,
    parallel,
    train_autoencoder,
    train_decoder,
    train_denoiser,
)
from ldmfast.training.config import AutoencoderConfig, DecoderConfig, DenoiserConfig
from ldmfast.training.step import Step

CONFIG = DenoiserConfig(
    steps=4,
    batch=4,
    channels=(16, 32),
    attention=(0, 1),
    groups=8,
    head_width=16,
    warmup=1,
    save_every=2,
    log_every=2,
    precision="fp32",
    device="cpu",
    condition="none",
)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Pictures and an autoencoder with random weights."""
    home = tmp_path_factory.mktemp("denoiser")
    few = {name: emoji.folder_cutouts(CUTOUTS)[name] for name in ("lemon", "rocket")}
    emoji.build(few, home / "pictures", size=16, count=1)
    common = dict(steps=1, batch=2, warmup=0, precision="fp32", sample_every=1)
    shape = AutoencoderConfig(size=16, channels=(8, 16), groups=4, **common)
    train_autoencoder.train(home / "pictures", home, shape, quiet=True)
    train_decoder.train(home / "pictures", home, home / "decoder", DecoderConfig(**common), quiet=True)
    return home


@pytest.mark.parametrize("stage", [".", "decoder"])
def test_autoencoders_show_pictures_above_their_reconstructions(stage, home):
    with Image.open(home / stage / "samples" / "step-000001.png") as sheet:
        assert sheet.size == (8 * 20 - 4, 2 * 20 - 4)
        above, below = sheet.crop((0, 0, 156, 16)), sheet.crop((0, 20, 156, 36))
    assert len(above.getcolors(10**6)) > 8 and above.tobytes() != below.tobytes()


def test_a_decoder_is_sharpened_by_a_discriminator_under_the_same_latents(home, tmp_path):
    config = DecoderConfig(
        steps=2,
        batch=2,
        warmup=0,
        precision="fp32",
        adversarial=0.5,
        logvar="learned",
        perceptual="squeezenet1.1",
        discriminator_channels=4,
        discriminator_layers=2,
        export="fp32",
    )
    found = train_decoder.train(home / "pictures", home, tmp_path, config, quiet=True)
    assert (found["adversarial"], found["perceptual"], found["steps"]) == (0.5, "squeezenet1.1", 2)
    row = autoencoders.evaluate([tmp_path], home / "pictures", split="train", count=4)["rows"][0]
    assert (row["adversarial"], row["trained_with"], row["steps"]) == (0.5, "squeezenet1.1", 2)
    before, after = saved_autoencoder.load(home), saved_autoencoder.load(tmp_path)
    kept = checkpoint.load(tmp_path / "decoder.pt")
    assert {"logvar", "discriminator.0.weight"} <= kept["model"].keys() and len(kept["optimizer"]) == 3
    halves = [{n: p for n, p in vae.state_dict().items()} for vae in (before, after)]
    moved = {n.split(".")[0] for n, p in halves[0].items() if not torch.equal(p, halves[1][n])}
    assert moved == {"decoder", "post_quant_conv"}
    with pytest.raises(ValueError, match="16 pixels: a discriminator of 3 layers needs 24"):
        train_decoder.train(home / "pictures", home, tmp_path / "other", DecoderConfig(adversarial=0.5), quiet=True)


def test_the_seed_alone_decides_a_decoders_training(home, tmp_path):
    config = DecoderConfig(
        steps=1, batch=2, precision="fp32", adversarial=0.5, discriminator_channels=4, discriminator_layers=1
    )
    found = []
    for name in "ab":
        torch.rand(1)  # what else was drawn in the process
        train_decoder.train(home / "pictures", home, tmp_path / name, config, quiet=True)
        found.append(checkpoint.load(tmp_path / name / "decoder.pt")["model"]["discriminator.0.weight"])
    assert torch.equal(*found)


@pytest.fixture
def pictures(home):
    return load_pictures(home / "pictures", 16, split="train")


def prepare(pictures, vae, **options):
    return latents.prepare(pictures, vae, accelerator=parallel.start(CONFIG), **options)


def test_latents_are_kept_and_checked(home, pictures, tmp_path, monkeypatch):
    vae, file = saved_autoencoder.load(home), tmp_path / "kept" / "latents.safetensors"
    fresh, made = prepare(pictures, vae), prepare(pictures, vae, file=str(file))
    monkeypatch.setattr(latents, "_encoded", lambda *_: pytest.fail("they were encoded again"))
    again = prepare(pictures, vae, file=str(file))
    assert torch.equal(fresh.mean, made.mean)
    assert torch.equal(made.mean, again.mean) and torch.equal(made.std, again.std)
    assert [p.name for p in file.parent.iterdir()] == [file.name]
    with pytest.raises(ValueError, match="made from other pictures; remove it"):
        prepare(pictures.where(object="lemon"), vae, file=str(file))
    vae.quant_conv.bias.data += 1
    with pytest.raises(ValueError, match="made from other autoencoder weights"):
        prepare(pictures, vae, file=str(file))
    file.write_bytes(b"<html>")
    with pytest.raises(ValueError, match="holds no latents"):
        prepare(pictures, vae, file=str(file.parent))
    with pytest.raises(ValueError, match="holds no latents"):
        prepare(pictures, vae, file=str(file))


def test_measured_scaling_gives_deviation_1_and_is_undone_in_decoding(home, pictures):
    vae = saved_autoencoder.load(home)
    vae.quant_conv.weight.data[:4] *= 7
    codes = prepare(pictures, vae, scale="std")
    noisy = codes.mean + codes.std * torch.randn(codes.mean.shape)
    assert abs(codes.factor * noisy.std() - 1) < 0.05
    plain = prepare(pictures, vae, scale="config")  # the factor is the autoencoder's from now on
    assert torch.equal(plain.mean, codes.mean) and abs(vae.config.scaling_factor - 1) > 0.1
    assert plain.factor == codes.factor == vae.config.scaling_factor
    learned = plain.sample_latents(torch.arange(len(plain)).repeat(50), Step(0, 0, 0, 50 * len(plain)))
    assert abs(learned.std() - 1) < 0.05


def test_an_encoder_trained_jointly_is_saved_with_the_pipeline(home, tmp_path):
    encoder = ClassEmbedder(["lemon", "rocket"], 16)
    before = encoder.embedding.weight.clone()
    config = dataclasses.replace(CONFIG, guidance_dropout=0.5)
    train_denoiser.train(
        home / "pictures", home, tmp_path, config, conditioner=encoder, describe=lambda row: [row["object"]], quiet=True
    )
    assert "conditioner.embedding.weight" in checkpoint.load(tmp_path / "denoiser.pt")["model"]
    assert (encoder.embedding.weight != before).any(dim=1).all()  # both classes and the empty one
    pipeline = LatentDiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    assert torch.allclose(pipeline.conditioner.embedding.weight, encoder.embedding.weight, rtol=1e-3)
    assert pipeline(["rocket"], steps=1)[0].size == (16, 16)


@pytest.mark.parametrize("condition", ["class", "transformer", "inpainting", "super-resolution"])
def test_every_condition_trains_draws_and_is_saved(condition, home, tmp_path):
    config = dataclasses.replace(CONFIG, condition=condition, steps=2, sample_every=2, width=16, text_layers=1)
    assert train_denoiser.train(home / "pictures", home, tmp_path, config, quiet=True)[-1][0] == 2
    assert [p.name for p in (tmp_path / "samples").iterdir()] == ["step-000002.png"]
    pipeline = LatentDiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    picture = torch.zeros(3, 16, 16)
    asked = {
        "class": dict(inputs="rocket"),
        "transformer": dict(inputs="a rocket on a red background"),
        "inpainting": dict(image=picture, mask=torch.ones(1, 16, 16)),
        "super-resolution": dict(image=picture[:, :8, :8]),
    }[condition]
    assert pipeline(**asked, steps=1)[0].size == (16, 16)


def test_a_caption_can_join_the_timestep_too(home, tmp_path):
    pooled = dict(condition="transformer", width=16, text_layers=1, pooled_text=True, time_embedding="scale_shift")
    config = dataclasses.replace(CONFIG, steps=2, **pooled)
    train_denoiser.train(home / "pictures", home, tmp_path, config, quiet=True)
    pipeline = LatentDiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    unet, stock = pipeline.unet, UNet2DConditionModel.from_pretrained(tmp_path / "pipeline" / "unet")
    assert unet.config.addition_embed_type == "text" and unet.config.resnet_time_scale_shift == "scale_shift"
    x, context = torch.randn(2, unet.config.in_channels, 8, 8), torch.randn(2, 24, 16)
    with torch.no_grad():
        ours, theirs, other = unet(x, 500, context), stock(x, 500, context), unet(x, 500, context.flip(0))
    assert torch.allclose(ours.sample, theirs.sample, atol=1e-5) and not torch.allclose(ours.sample, other.sample)


def test_a_class_that_is_missing_is_named(home, tmp_path):
    config = dataclasses.replace(CONFIG, condition="class", class_key="species")
    with pytest.raises(ValueError, match="has no 'species' in metadata.jsonl; --class-key"):
        train_denoiser.train(home / "pictures", home, tmp_path, config, quiet=True)


def test_masks_are_rectangles_of_a_quarter_to_three_quarters():
    masks = condition_sources.rectangles(Step(0, 0, 0, 64), (32, 16))
    assert masks.shape == (64, 1, 32, 16) and set(masks.unique().tolist()) == {0.0, 1.0}
    for axis, length in ((3, 32), (2, 16)):
        sides = masks.amax(dim=axis).flatten(1).sum(dim=1) / length
        assert sides.min() > 0.15 and sides.max() < 0.85 and sides.max() - sides.min() > 0.3
    filled = masks.amax(dim=3).flatten(1).sum(1) * masks.amax(dim=2).flatten(1).sum(1)
    assert torch.equal(filled, masks.flatten(1).sum(1))


def test_an_unconditional_denoiser_reports_as_it_trains(home, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = dataclasses.replace(CONFIG, tensorboard=True, sample_every=2)
    history = train_denoiser.train(home / "pictures", home, tmp_path, config, quiet=True)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert {"loss", "lr", "grad_norm", "samples_per_second"} <= set(events.Tags()["scalars"])
    assert [(e.step, pytest.approx(e.value)) for e in events.Scalars("loss")] == [tuple(entry) for entry in history]
    assert [e.step for e in events.Images("samples")] == [2, 4]
    names = sorted(p.name for p in (tmp_path / "samples").iterdir())
    assert names == ["step-000002.png", "step-000004.png"]
    with Image.open(tmp_path / "samples" / names[0]) as sheet:
        assert sheet.size[0] > 4 * 16 and sheet.size == Image.open(tmp_path / "samples" / names[1]).size
    # drawing them changes nothing
    other = train_denoiser.train(home / "pictures", home, tmp_path / "other", CONFIG, quiet=True)
    assert other == history


def test_tensorboard_that_is_missing_is_explained(home, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    config = dataclasses.replace(CONFIG, tensorboard=True)
    with pytest.raises(ImportError, match="pip install tensorboard"):
        train_denoiser.train(home / "pictures", home, tmp_path, config, quiet=True)
