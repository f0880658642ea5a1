"""Trainings of autoencoders with all that their loss may have: resumed bit for bit, at every f, of refused options."""

from __future__ import annotations

import dataclasses
import json

import pytest
from test_autoencoder_loss import TINY, lemons
from test_training import same

from ldmfast.data.collection import load_pictures
from ldmfast.models import VQModel
from ldmfast.pipeline import saved_autoencoder
from ldmfast.training import checkpoint, latents, train_autoencoder


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    return lemons(tmp_path_factory)


FULL = {
    "kl": {"adversarial": 0.5, "adversarial_start": 1, "logvar": "learned", "crop": 14},
    "vq": {
        "family": "vq",
        "adversarial": 0.5,
        "adversarial_start": 4,
        "logvar": "learned",
        "revive_every": 2,
        "codebook_start": 1,
    },
    "features": {
        "adversarial": 0.5,
        "adversarial_start": 2,
        "discriminator_features": "squeezenet1.1",
        "discriminator_layers": 2,
        "logvar": "learned",
    },
    "spectral": {
        "adversarial": 0.5,
        "adversarial_start": 4,
        "discriminator_lead": 3,
        "discriminator_norm": "spectral",
        "logvar": "learned",
    },
}


@pytest.mark.parametrize("family", FULL)
def test_a_stopped_run_with_a_discriminator_resumes_bit_for_bit(family, collection, tmp_path, monkeypatch):
    c = dataclasses.replace(TINY, **FULL[family])

    def train(folder):
        train_autoencoder.train(collection, folder, c, quiet=True)
        return checkpoint.load(folder / "autoencoder.pt")

    whole = train(tmp_path / "whole")
    real = train_autoencoder.loss_of

    def stopping(*arguments):
        losses_of = real(*arguments)

        def interrupted(s):
            if s.number == 3:
                raise KeyboardInterrupt
            return losses_of(s)

        return interrupted

    monkeypatch.setattr(train_autoencoder, "loss_of", stopping)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts")
    monkeypatch.undo()
    assert checkpoint.load(tmp_path / "parts" / "autoencoder.pt")["step"] == 3
    parts = train(tmp_path / "parts")
    assert len(whole["optimizer"]) == 3 and any("discriminator" in name for name in whole["model"])
    assert same(whole, parts)


@pytest.mark.parametrize("levels", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("family", ["kl", "vq"])
def test_every_factor_trains_and_loads(levels, family, collection, tmp_path):
    c = dataclasses.replace(TINY, channels=(8,) * levels, family=family, steps=1, save_every=1, log_every=1)
    metrics = train_autoencoder.train(collection, tmp_path, c, quiet=True)["trained"]
    assert metrics.keys() == {"psnr", "ssim"} | ({"perplexity", "used"} if family == "vq" else set())
    model = saved_autoencoder.load(tmp_path)
    z = latents.encode(load_pictures(collection, 16), model)[0]
    assert z.shape[2] == 16 // 2 ** (levels - 1) and isinstance(model, VQModel) == (family == "vq")
    assert (z * model.config.scaling_factor).std().item() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("name", ["UNet2DConditionModel", "Flux"])
def test_a_network_that_is_no_autoencoder_is_refused_by_name(name, tmp_path):
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text(json.dumps({"_class_name": name}))
    with pytest.raises(ValueError, match=name):
        saved_autoencoder.load(tmp_path)


@pytest.mark.parametrize(
    "wrong",
    [
        {"family": "gan"},
        {"codebook": 0},
        {"revive_every": -1},
        {"codebook_start": -1},
        {"perceptual": "lpips"},
        {"logvar": "free"},
        {"adversarial": -0.5},
        {"discriminator_lead": -1},
        {"start": "zero"},
        {"crop": 3},
        {"crop": 32},
        {"size": 9},
        {"discriminator_layers": 0},
        {"discriminator_norm": "group"},
        {"discriminator_features": "pixels"},
    ],
)
def test_a_wrong_configuration_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        dataclasses.replace(TINY, **wrong)
