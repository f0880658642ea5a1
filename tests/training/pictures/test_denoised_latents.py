"""A decoder that learns to draw what a denoiser gives back."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tiny import CUTOUTS
from torch import nn

from ldmfast.data import emoji
from ldmfast.data.collection import load_pictures
from ldmfast.pipeline import LatentDiffusionPipeline, saved_autoencoder
from ldmfast.training import denoised_latents, latents, train_autoencoder, train_decoder, train_denoiser
from ldmfast.training.config import AutoencoderConfig, DecoderConfig, DenoiserConfig
from ldmfast.training.step import Step

COMMON = dict(steps=1, batch=4, warmup=0, precision="fp32", device="cpu", export="fp32")
SHAPE = (4, 8, 8)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Pictures, an autoencoder and a denoiser of captions, with random weights."""
    home = tmp_path_factory.mktemp("denoised")
    few = {name: emoji.folder_cutouts(CUTOUTS)[name] for name in ("lemon", "rocket")}
    emoji.build(few, home / "pictures", size=16, count=1)
    train_autoencoder.train(
        home / "pictures", home, AutoencoderConfig(size=16, channels=(8, 16), groups=4, **COMMON), quiet=True
    )
    shape = dict(channels=(16, 32), attention=(0, 1), groups=8, head_width=16, width=32, text_layers=1)
    config = DenoiserConfig(condition="transformer", **shape, **COMMON)
    train_denoiser.train(home / "pictures", home, home, config, quiet=True)
    return home


@pytest.fixture
def pipeline(home):
    return LatentDiffusionPipeline.from_pretrained(home / "pipeline")


@pytest.fixture
def pictures(home):
    return load_pictures(home / "pictures", 16, split="train", captions=True)


class Knowing(nn.Module):
    """A U-Net that knows the clean latents: its prediction of the noise is exact. It notes the times it is asked at."""

    def __init__(self, unet, alphas, clean):
        super().__init__()
        self.config, self.alphas, self.clean, self.times = unet.config, alphas, clean, []

    @property
    def device(self):
        return self.clean.device

    def forward(self, x, t, **_):
        alpha = self.alphas[int(t)].to(x.dtype)
        self.times.append(int(t))
        clean = torch.cat([self.clean] * (len(x) // len(self.clean)))
        return type("Out", (), {"sample": (x - alpha.sqrt() * clean) / (1 - alpha).sqrt()})


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("most", [0.1, 0.5])
def test_an_exact_denoiser_gives_back_what_it_was_given(pipeline, pictures, guidance, most):
    z = torch.randn(3, *SHAPE)
    unet = Knowing(pipeline.unet, pipeline.scheduler.alphas_cumprod, z)
    pipeline.unet, pipeline.guidance = unet, guidance
    denoised = denoised_latents.DenoisedLatents(pipeline, pictures.rows, SHAPE, most)
    for number in range(6):
        found = denoised(z, torch.tensor([0, 1, 2]), Step(0, number, 0, 3))
        torch.testing.assert_close(found, z, atol=1e-4, rtol=1e-4)
    assert 0 < max(unet.times) <= 1000 * most and len(set(unet.times)) > (1 if most > 0.1 else 0)


def test_the_captions_and_the_step_decide(pipeline, pictures):
    """Another picture's captions change the result; the same step repeats it, another one does not."""
    denoised = denoised_latents.DenoisedLatents(pipeline, pictures.rows, SHAPE, 0.45)
    z, first = torch.randn(2, *SHAPE), torch.tensor([0, 0])
    other = next(i for i, row in enumerate(pictures.rows) if row["object"] != pictures.rows[0]["object"])
    found = denoised(z, first, Step(0, 1, 0, 2))
    assert torch.equal(found, denoised(z, first, Step(0, 1, 0, 2)))
    assert not torch.allclose(found, denoised(z, first, Step(0, 2, 0, 2)))
    assert not torch.allclose(found, denoised(z, torch.tensor([other, other]), Step(0, 1, 0, 2)))


def test_a_scaled_autoencoder_decodes_unscaled_latents(pipeline, pictures):
    z = torch.randn(2, *SHAPE)
    pipeline.vae.register_to_config(scaling_factor=0.25)
    pipeline.unet = Knowing(pipeline.unet, pipeline.scheduler.alphas_cumprod, z * 0.25)
    denoised = denoised_latents.DenoisedLatents(pipeline, pictures.rows, SHAPE, 0.3)
    torch.testing.assert_close(denoised(z, torch.tensor([0, 1]), Step(0, 0, 0, 2)), z, atol=1e-4, rtol=1e-4)


def test_what_does_not_fit(pipeline, pictures):
    with pytest.raises(ValueError, match=r"draws latents \(4, 8, 8\), the autoencoder's are \(8, 8, 8\)"):
        denoised_latents.DenoisedLatents(pipeline, pictures.rows, (8, 8, 8), 0.4)
    with pytest.raises(ValueError, match="denoised_most=0.01 must be at least"):
        denoised_latents.DenoisedLatents(pipeline, pictures.rows, SHAPE, 0.01)


def test_a_decoder_is_trained_on_them(home, pictures, tmp_path, monkeypatch):
    """share 1: every step's latents are denoised ones; share 0: none are."""
    seen = []
    real = denoised_latents.DenoisedLatents.__call__
    monkeypatch.setattr(
        denoised_latents.DenoisedLatents, "__call__", lambda self, *a: seen.append(len(a[0])) or real(self, *a)
    )
    config = DecoderConfig(**COMMON, denoiser=str(home / "pipeline"))
    config = dataclasses.replace(config, steps=2)
    weights = []
    for share, asked in ((0.0, 0), (1.0, 2)):
        seen.clear()
        settings = dataclasses.replace(config, denoised_share=share)
        train_decoder.train(home / "pictures", home, tmp_path / str(share), settings, quiet=True)
        assert len(seen) == asked
        weights.append(saved_autoencoder.load(tmp_path / str(share)).decoder.conv_in.weight)
    assert not torch.equal(*weights)
    mean, _ = latents.encode(pictures, saved_autoencoder.load(tmp_path / "1.0"))
    torch.testing.assert_close(mean, latents.encode(pictures, saved_autoencoder.load(home))[0])
