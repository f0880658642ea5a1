"""The two stages on a tiny collection: they learn, they resume bit for bit, they survive SIGKILL in a save."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import diffusers
import pytest
import torch
from tiny import CUTOUTS

from ldmfast.data import emoji
from ldmfast.data.collection import load_pictures
from ldmfast.evaluation import samples
from ldmfast.models import AutoencoderKL
from ldmfast.pipeline import saved_autoencoder
from ldmfast.training import checkpoint, config, train_autoencoder, train_decoder, train_denoiser
from ldmfast.training.losses import autoencoder_loss

TINY_AUTOENCODER = config.AutoencoderConfig(
    steps=6, batch=4, size=16, channels=(8, 16), groups=4, warmup=1, save_every=2, log_every=2, precision="fp32"
)
TINY_DECODER = config.DecoderConfig(steps=6, batch=4, warmup=1, save_every=2, log_every=2)
TINY_DENOISER = config.DenoiserConfig(
    steps=6, batch=4, channels=(16, 32), attention=(0, 1), groups=8, head_width=16, warmup=1, save_every=2, log_every=2
)


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    folder = tmp_path_factory.mktemp("emoji") / "collection"
    cutouts = emoji.folder_cutouts(CUTOUTS)
    few = {name: cutouts[name] for name in ("lemon", "rocket")}
    emoji.build(few, folder, size=16, count=1)
    return folder


@pytest.fixture(scope="module")
def trained(collection, tmp_path_factory):
    """A finished run of both stages."""
    home = tmp_path_factory.mktemp("run")
    train_autoencoder.train(collection, home, TINY_AUTOENCODER, quiet=True)
    train_denoiser.train(collection, home, home, TINY_DENOISER, quiet=True)
    return home


def same(a, b):
    """Two checkpoints hold the same bits."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


# --- stages --------------------------------------------------------------------------------------------------------


def test_standardising_keeps_the_pictures():
    model = train_autoencoder.build(TINY_AUTOENCODER).eval()
    x = torch.rand(8, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        before = model.encode(x).latent_dist
        pictures = model.decode(before.mean).sample
        mean, std = before.mean.mean(dim=(0, 2, 3)), before.mean.std(dim=(0, 2, 3))
        train_autoencoder.standardise(model, mean, std)
        after = model.encode(x).latent_dist
        assert torch.allclose(model.decode(after.mean).sample, pictures, atol=1e-4)
    assert torch.allclose(after.mean.mean(dim=(0, 2, 3)), torch.zeros(4), atol=1e-4)
    assert torch.allclose(after.mean.std(dim=(0, 2, 3)), torch.ones(4), atol=1e-4)
    assert torch.allclose(after.std, before.std / std.view(1, -1, 1, 1), rtol=1e-4)


def test_the_autoencoder_learns(collection, tmp_path):
    longer = dataclasses.replace(TINY_AUTOENCODER, steps=60, warmup=5, log_every=10, save_every=60)
    history = train_autoencoder.train(collection, tmp_path, longer, quiet=True)["loss"]
    assert history[-1][1] < 0.8 * history[0][1]


def test_the_decoder_changes_no_latent(collection, trained, tmp_path):
    metrics = train_decoder.train(collection, trained, tmp_path, TINY_DECODER, quiet=True)
    assert metrics["loss"][-1][0] == 6
    before, after = (saved_autoencoder.load(folder).state_dict() for folder in (trained, tmp_path))
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"decoder", "post_quant_conv"}


def test_the_denoiser_learns(collection, trained, tmp_path):
    longer = dataclasses.replace(TINY_DENOISER, steps=60, warmup=5, log_every=10, save_every=60)
    history = train_denoiser.train(collection, trained, tmp_path, longer, quiet=True)
    assert history[-1][1] < 0.9 * history[0][1]


def test_held_out_pictures_are_never_read(collection):
    pictures = load_pictures(collection, 16, split="train")
    assert len(pictures) == 14 and all(row["split"] == "train" for row in pictures.rows)


def stages(collection, trained):
    def first(folder):
        train_autoencoder.train(collection, folder, TINY_AUTOENCODER, quiet=True)
        return checkpoint.load(Path(folder, "autoencoder.pt"))

    def second(folder):
        train_denoiser.train(collection, trained, folder, TINY_DENOISER, quiet=True)
        return checkpoint.load(Path(folder, "denoiser.pt"))

    return {"autoencoder": first, "denoiser": second}


@pytest.mark.parametrize("stage", ["autoencoder", "denoiser"])
def test_a_stopped_run_resumes_bit_for_bit(stage, collection, trained, tmp_path, monkeypatch):
    train = stages(collection, trained)[stage]
    whole = train(tmp_path / "whole")
    module = {"autoencoder": train_autoencoder, "denoiser": train_denoiser}[stage]
    real = module.loss_of

    def stopping(*args):
        step, count = real(*args), iter(range(100))

        def interrupted(s):
            if next(count) == 3:
                raise KeyboardInterrupt
            return step(s)

        return interrupted

    monkeypatch.setattr(module, "loss_of", stopping)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts")
    monkeypatch.undo()
    assert checkpoint.load(tmp_path / "parts" / f"{stage}.pt")["step"] == 3
    parts = train(tmp_path / "parts")
    # the mean over the entry that the stop fell into covers only the steps after it
    assert whole.pop("history")[-1] == parts.pop("history")[-1]
    assert same(whole, parts)


KILLED = """
import io, sys, time, pathlib, torch
from ldmfast.training import checkpoint, config, train_autoencoder
from ldmfast.training.losses import autoencoder_loss
from test_training import TINY_AUTOENCODER
data, folder, marker = sys.argv[1:]
write, saves = torch.save, []
def slow(state, file):
    saves.append(1)
    if len(saves) < 2:
        return write(state, file)
    buffer = io.BytesIO(); write(state, buffer)
    file.write(buffer.getvalue()[: buffer.tell() // 2]); file.flush()
    pathlib.Path(marker).touch(); time.sleep(600)
torch.save = slow
train_autoencoder.train(data, folder, TINY_AUTOENCODER, quiet=True)
"""


def test_sigkill_in_a_save_loses_only_the_steps_since_the_last(collection, trained, tmp_path):
    folder, marker = tmp_path / "run", tmp_path / "saving"
    here = Path(__file__).parent
    path = os.pathsep.join(map(str, (here, *here.parents[:2])))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-c", KILLED, str(collection), str(folder), str(marker)]
    process = subprocess.Popen(command, env=environment)
    try:
        until = time.monotonic() + 300
        while not marker.exists() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
        assert marker.exists(), "the run never reached its second save"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    (partial,) = folder.glob(".*.partial.pt")
    assert partial.stat().st_size > 0
    assert checkpoint.load(folder / "autoencoder.pt")["step"] == 2
    train = stages(collection, trained)["autoencoder"]
    resumed, whole = train(folder), train(tmp_path / "whole")
    assert resumed["step"] == 6 and same(resumed, whole)
    assert not partial.exists()


def test_another_configuration_is_refused(collection, trained):
    other = dataclasses.replace(TINY_AUTOENCODER, learning_rate=1e-4)
    with pytest.raises(ValueError, match="learning_rate was 0.001, is 0.0001.*--restart"):
        train_autoencoder.train(collection, trained, other, quiet=True)


def test_a_run_of_constant_learning_rate_can_go_on_for_longer(collection, trained, tmp_path):
    shutil.copy(trained / "denoiser.pt", tmp_path)
    longer = dataclasses.replace(TINY_DENOISER, steps=TINY_DENOISER.steps + 2)
    assert train_denoiser.train(collection, trained, tmp_path, longer, quiet=True)[-1][0] == longer.steps
    cosine = dataclasses.replace(TINY_AUTOENCODER, steps=TINY_AUTOENCODER.steps + 2)
    with pytest.raises(ValueError, match="steps was"):
        train_autoencoder.train(collection, trained, cosine, quiet=True)


@pytest.mark.parametrize("keep", [0, 10, 2000])
def test_a_damaged_checkpoint_is_explained(trained, tmp_path, keep):
    damaged = tmp_path / "autoencoder.pt"
    damaged.write_bytes((trained / "autoencoder.pt").read_bytes()[:keep])
    with pytest.raises(ValueError, match="damaged or no checkpoint"):
        checkpoint.load(damaged)


def test_a_loss_that_is_not_finite_stops_the_run(collection, tmp_path, monkeypatch):
    monkeypatch.setattr(autoencoder_loss, "kl_loss", lambda posterior: posterior.mean.sum() * float("nan"))
    with pytest.raises(FloatingPointError, match="nan at step 1"):
        train_autoencoder.train(collection, tmp_path, TINY_AUTOENCODER, quiet=True)


def test_exported_folders_load_in_diffusers(trained):
    vae = diffusers.AutoencoderKL.from_pretrained(trained / "pipeline" / "vae", torch_dtype=torch.float32)
    unet = diffusers.UNet2DConditionModel.from_pretrained(trained / "pipeline" / "unet", torch_dtype=torch.float32)
    ours = AutoencoderKL.from_pretrained(trained / "vae", torch_dtype=torch.float32)
    assert type(vae) is diffusers.AutoencoderKL and unet.config.cross_attention_dim == 384
    assert all(torch.equal(a, b) for a, b in zip(vae.state_dict().values(), ours.state_dict().values(), strict=True))


# --- evaluation ------------------------------------------------------------------------------------------------


def test_retrieval_tells_right_from_wrong(collection):
    pictures = load_pictures(collection, 16, captions=True)
    by_text = {row["text"]: i for i, row in enumerate(pictures.rows)}

    def draw(right):
        def pipeline(prompts, **_):
            texts = prompts if right else [p.replace("lemon", "?").replace("rocket", "lemon") for p in prompts]
            index = [by_text[text.replace("?", "rocket")] for text in texts]
            return [emoji.Image.fromarray(pictures.pixels[i].permute(1, 2, 0).numpy()) for i in index]

        return pipeline

    rows = samples.choose(pictures.rows, 20, seed=0)
    assert len({row["text"] for row in rows}) == 16  # each once before any twice
    score = lambda right: samples.retrieval(draw(right), pictures, rows, steps=1, guidance=1, seed=0)  # noqa: E731
    assert score(True) == {"colour": 1.0, "object": 1.0, "all": 1.0, "all, R@5": 1.0}
    wrong = score(False)
    assert wrong.pop("all, R@5") > 0  # there are but 16 combinations
    assert wrong == {"colour": 1.0, "object": 0.0, "all": 0.0}
