"""What is computed of every picture, too large for the memory: on the disk, to the same bits as from the memory."""

from __future__ import annotations

import dataclasses
import os

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ldmfast.conditioning import Condition
from ldmfast.data import collection, rows_on_disk
from ldmfast.data.collection import load_pictures
from ldmfast.pipeline import saved_autoencoder
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

BRIEF = dict(steps=2, batch=2, warmup=0, precision="fp32", export="fp32", device="cpu")
CONFIG = DenoiserConfig(**BRIEF, channels=(16, 16), attention=(0, 1), groups=8, head_width=16, condition="text")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Six pictures with captions, and an autoencoder of random weights."""
    home = tmp_path_factory.mktemp("rows")
    (home / "pictures").mkdir()
    for i in range(6):
        colours = np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(colours).save(home / "pictures" / f"{i}.png")
        (home / "pictures" / f"{i}.txt").write_text(f"picture {i}")
    shape = AutoencoderConfig(size=16, channels=(8, 16), groups=4, **BRIEF)
    train_autoencoder.train(home / "pictures", home, shape, quiet=True)
    return home


@pytest.fixture
def little_memory(monkeypatch):
    """A function: from here on nothing of a collection stays in memory."""
    return lambda: monkeypatch.setattr(rows_on_disk, "IN_MEMORY", 0)


@pytest.mark.parametrize("dtype", rows_on_disk.NAMES.values())
@pytest.mark.parametrize("row", [(), (3,), (2, 3, 4)])
def test_rows_come_back_as_they_were_written(dtype, row, tmp_path):
    wanted = {name: (torch.randn(5, *row) * 3).to(dtype) for name in ("first", "second")}
    tables = {name: (value.shape, dtype) for name, value in wanted.items()}

    def fill(found):
        for name, value in wanted.items():
            found[name].write(2, value[2:])
            found[name].write(0, value[:2])

    scratch = rows_on_disk.scratch(tmp_path / "made", tables)
    fill(scratch)
    rows_on_disk.keep(tmp_path / "a.safetensors", tables, {"made": "here"}, fill)
    assert list((tmp_path / "made").iterdir()) == []  # it has no name
    for name, value in wanted.items():
        assert torch.equal(load_file(tmp_path / "a.safetensors")[name], value)
        for found in (scratch[name], rows_on_disk.kept(tmp_path / "a.safetensors")[name]):
            assert (found.shape, found.dtype, len(found)) == (value.shape, dtype, 5)
            for index in (slice(None), slice(1, 4), [4, 0, 4], torch.tensor([3, 1]), torch.tensor([[0], [2]]), 2, []):
                assert torch.equal(found[index], value[index]), index


def test_a_file_that_is_cut_while_it_is_used_is_named(tmp_path):
    path = tmp_path / "a.safetensors"
    rows_on_disk.keep(path, {"x": ((4, 2), torch.float32)}, {}, lambda found: found["x"].write(0, torch.ones(4, 2)))
    found = rows_on_disk.kept(path)["x"]
    os.truncate(path, path.stat().st_size - 8)
    assert torch.equal(found[2], torch.ones(2))
    with pytest.raises(ValueError, match="a.safetensors ends before its row 3: it was cut; remove it"):
        found[3]


def test_a_file_that_could_not_be_filled_is_not_there(tmp_path):
    def fail(found):
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        rows_on_disk.keep(tmp_path / "a", {"x": ((4, 2), torch.float32)}, {}, fail)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("scale", ["config", "std"])
@pytest.mark.parametrize("named", [False, True])
def test_latents_on_the_disk_are_those_in_memory(named, scale, home, tmp_path, little_memory):
    pictures = load_pictures(home / "pictures", 16)
    file = str(tmp_path / "kept" / "latents.safetensors") if named else ""
    index, found, factors = torch.tensor([5, 0, 0, 3]), [], []
    for kind in (torch.Tensor, rows_on_disk.RowsOnDisk):
        vae = saved_autoencoder.load(home)
        vae.register_to_config(shift_factor=0.25, scaling_factor=0.5)
        settings = dict(file=file, folder=tmp_path, scale=scale)
        codes = latents.prepare(pictures, vae, **settings, accelerator=parallel.start(CONFIG))
        assert isinstance(codes.mean, kind) and isinstance(codes.std, kind) and len(codes) == 6
        found.append(codes.sample_latents(index, Step(0, 1, 0, 4)))
        factors.append(vae.config.scaling_factor)
        little_memory()
    assert torch.equal(*found) and factors[0] == factors[1] and (factors[0] != 0.5) == (scale == "std")
    noise = Step(0, 1, 0, 4).normal(*codes.shape)
    mean = (codes.mean[index] - 0.25) * factors[0]
    assert torch.equal(found[0], mean + codes.std[index] * factors[0] * noise)


class Answers:
    """A frozen conditioner of two parts; `lengths` of its contexts, by how many inputs it has seen."""

    trainable, settings = False, {"name": "answers"}

    def __init__(self, *lengths):
        self.lengths, self.weight = list(lengths), torch.zeros(2)

    def state_dict(self):
        return {"weight": self.weight}

    def to(self, device):
        return self

    def __call__(self, inputs):
        length = self.lengths.pop(0) if self.lengths else 3
        values = torch.tensor([float(i) for i in inputs])
        mask = torch.arange(length) < 1 + values[:, None] % length
        return Condition(context=values[:, None, None] + torch.arange(length * 2.0).view(length, 2), context_mask=mask)

    def empty(self, n):
        return Condition(context=torch.zeros(n, 3, 2), context_mask=torch.ones(n, 3, dtype=torch.bool))


def test_conditions_on_the_disk_are_those_in_memory(tmp_path, little_memory, monkeypatch):
    monkeypatch.setattr(condition_sources, "TOGETHER", 2)
    config, described = dataclasses.replace(CONFIG, guidance_dropout=0.5), [[i, i + 1] for i in range(6)]
    index, found = torch.tensor([4, 1, 1, 0, 3, 5]), []
    for kind in (torch.Tensor, rows_on_disk.RowsOnDisk):
        source = condition_sources.gather(Answers(), described, config, folder=tmp_path)
        assert isinstance(source.conditions.context, kind) and len(source.conditions) == 7
        found.append(source.conditions_of(index, Step(0, 3, 0, 6)))
        little_memory()
    assert torch.equal(found[0].context, found[1].context) and found[0].context.dtype is torch.float32
    assert torch.equal(found[0].context_mask, found[1].context_mask) and not found[0].context_mask.all()
    with pytest.raises(ValueError, match=r"7 conditions cannot be kept .* context has \[4, 2\] after \[3, 2\]"):
        condition_sources.gather(Answers(3, 4), described, config, folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_conditions_are_kept_and_checked(tmp_path, little_memory, monkeypatch):
    monkeypatch.setattr(condition_sources, "TOGETHER", 2)
    file, described, index = tmp_path / "kept" / "captions.safetensors", [[i, i + 1] for i in range(6)], torch.arange(6)
    drawn, asked = [], Answers()
    for kept in ("", file, file, "little memory", file):
        if kept == "little memory":
            little_memory()
            continue
        source = condition_sources.gather(asked, described, CONFIG, file=kept)
        drawn.append(source.conditions_of(index, Step(0, 3, 0, 6)).context)
        if kept:  # from now on nothing is to be computed but the empty condition
            monkeypatch.setattr(Answers, "__call__", lambda *_: pytest.fail("they were computed again"))
    assert isinstance(source.conditions.context, rows_on_disk.RowsOnDisk)
    assert all(torch.equal(drawn[0], each) for each in drawn[1:]) and len(drawn) == 4
    assert [p.name for p in file.parent.iterdir()] == [file.name]
    with pytest.raises(ValueError, match="made from other captions; remove it"):
        condition_sources.gather(asked, described[1:], CONFIG, file=file)
    asked.weight += 1
    with pytest.raises(ValueError, match="made from other encoder weights; remove it"):
        condition_sources.gather(asked, described, CONFIG, file=file)
    asked.trainable = True
    with pytest.raises(ValueError, match="states=.* Answers is trained"):
        condition_sources.gather(asked, described, CONFIG, file=file)
    with pytest.raises(ValueError, match="states=.* condition=inpainting is made anew at every step"):
        condition_sources.make(dataclasses.replace(CONFIG, states="a", condition="inpainting"), None, None, 4)


def test_the_stages_train_from_the_disk_to_the_same_bits_and_go_on(home, tmp_path, little_memory):
    """One run in memory; one on the disk that is stopped after its first step and goes on."""
    weights = {}
    for way in ("held", "kept"):
        folder = tmp_path / way
        for steps in (2,) if way == "held" else (1, 2):
            config = dataclasses.replace(CONFIG, steps=steps)
            train_denoiser.train(home / "pictures", home, folder, config, quiet=True)
        decoder = DecoderConfig(**BRIEF)
        train_decoder.train(home / "pictures", home, folder / "decoder", decoder, quiet=True)
        assert (folder / collection.CACHE).exists() == (way == "kept")
        weights[way] = [
            checkpoint.load(path)["model"] for path in (folder / "denoiser.pt", folder / "decoder" / "decoder.pt")
        ]
        little_memory()
    for one, other in zip(*weights.values(), strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one) and one.keys() == other.keys()


@pytest.mark.parametrize("size, together", [(16, 64), (128, 64), (256, 16), (1024, 1), (4096, 1)])
def test_large_pictures_go_through_an_autoencoder_in_smaller_parts(size, together):
    pictures = collection.Pictures(torch.empty(100, 3, size, size, device="meta"), ({},) * 100)
    lengths = [len(range(100)[part]) for part in pictures.parts()]
    assert max(lengths) == lengths[0] == together and sum(lengths) == 100
