"""Collections that are too large for the memory: decoded once into a file, then read from it."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from ldmfast.data import collection, decoded, rows_on_disk
from ldmfast.data.collection import load_pictures
from ldmfast.training import latents, train_autoencoder
from ldmfast.training.config import AutoencoderConfig


@pytest.fixture(autouse=True)
def little_memory(monkeypatch):
    monkeypatch.setattr(rows_on_disk, "IN_MEMORY", 0)


@pytest.fixture
def folder(tmp_path):
    home = tmp_path / "pictures"
    home.mkdir()
    for i in range(6):
        colours = np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(colours).save(home / f"{i}.png")
        (home / f"{i}.txt").write_text(f"picture {i}")
    return home


def read(folder, tmp_path, **settings):
    return load_pictures(folder, 8, cache=tmp_path / "out" / collection.CACHE, **settings)


def test_what_is_read_is_what_memory_holds(folder, tmp_path):
    held, kept = load_pictures(folder, 8), read(folder, tmp_path)
    assert isinstance(held.pixels, torch.Tensor) and isinstance(kept.pixels, decoded.Decoded)
    assert kept.rows == held.rows and kept.pixels.shape == held.pixels.shape and len(kept) == len(kept.pixels) == 6
    for index in (slice(None), slice(2, 5), [4, 0, 4], torch.tensor([5, 1]), 3, torch.tensor(2)):
        assert torch.equal(kept.pixels[index], held.pixels[index])
        assert torch.equal(kept.batch(index), held.batch(index))
    for seed in range(3):
        some, same = kept.sample(3, seed), held.sample(3, seed)
        assert some.rows == same.rows and torch.equal(some.pixels[:], same.pixels)
        assert torch.equal(some.sample(2, 0).pixels[[1]], same.sample(2, 0).pixels[[1]])
    assert latents._digest_of(kept.pixels, 4) == latents._digest_of(held.pixels)


def test_it_is_decoded_once_and_again_when_a_file_changes(folder, tmp_path, monkeypatch):
    made = read(folder, tmp_path).pixels[:]
    calls, real = [], collection.read_picture
    monkeypatch.setattr(collection, "read_picture", lambda *given: calls.append(given) or real(*given))
    assert torch.equal(read(folder, tmp_path).pixels[:], made) and not calls
    Image.new("RGB", (8, 8), "red").save(folder / "3.png")
    changed = read(folder, tmp_path).pixels
    assert len(calls) == 6 and torch.equal(changed[3, None][0, :, 0, 0], torch.tensor([255, 0, 0]).byte())
    assert torch.equal(changed[[0, 5]], made[[0, 5]])


def test_a_broken_file_is_named_each_time_and_left_out(folder, tmp_path):
    (folder / "2.png").write_bytes(b"no picture")
    for _ in range(2):  # decoding, and from the cache
        with pytest.raises(ValueError, match="2.png is not a picture"):
            read(folder, tmp_path)
        with pytest.warns(UserWarning, match="left out of the training: .*2.png is not a picture"):
            found = read(folder, tmp_path, skip_broken=True)
        assert [row["file_name"] for row in found.rows] == ["0.png", "1.png", "3.png", "4.png", "5.png"]
        assert torch.equal(found.pixels[2], collection.read_picture(folder / "3.png", 8))


@pytest.mark.parametrize("damage", [b"", b"9", b"x\n", b"99999999\n", b"0\n{}", b"5\nnot json"])
def test_a_damaged_cache_is_made_anew(folder, tmp_path, damage):
    wanted = read(folder, tmp_path).pixels[:]
    (tmp_path / "out" / collection.CACHE).write_bytes(damage)
    assert torch.equal(read(folder, tmp_path).pixels[:], wanted)


def test_a_cache_that_is_cut_while_it_is_used_is_named(folder, tmp_path):
    found = read(folder, tmp_path)
    os.truncate(tmp_path / "out" / collection.CACHE, decoded.START + 100)
    with pytest.raises(ValueError, match="pictures.cache ends before its picture 0: "):
        found.batch([0])


def test_a_stage_trains_from_it_to_the_same_bits(folder, tmp_path, monkeypatch):
    settings = dict(size=8, channels=(16, 16), groups=8, steps=3, batch=2, precision="fp32", export="fp32")
    train_autoencoder.train(folder, tmp_path / "kept", AutoencoderConfig(**settings), quiet=True)
    assert (tmp_path / "kept" / collection.CACHE).is_file()
    monkeypatch.setattr(rows_on_disk, "IN_MEMORY", 1 << 30)
    train_autoencoder.train(folder, tmp_path / "held", AutoencoderConfig(**settings), quiet=True)
    assert not (tmp_path / "held" / collection.CACHE).exists()
    one, other = (tmp_path / each / "vae" / "diffusion_pytorch_model.safetensors" for each in ("kept", "held"))
    assert one.read_bytes() == other.read_bytes()
