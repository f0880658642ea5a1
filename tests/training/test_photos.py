"""Photographs: found with their licences, split by photograph, cropped; and the table of autoencoders made on them."""

from __future__ import annotations

import dataclasses
import json
import random

import numpy as np
import pytest
import torch
from PIL import Image
from test_autoencoder_loss import TINY

from ldmfast.commands.cli import main
from ldmfast.data import photos
from ldmfast.data.collection import load_pictures
from ldmfast.evaluation import autoencoders
from ldmfast.metrics import perceptual
from ldmfast.training import train_autoencoder

COPYRIGHT = """Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/

Files: 16.04/one_by_A.jpg
       16.04/two_by_A.jpg
Copyright: 2018, A <a@example.org>
           2019, B
License: CC-BY-4.0

Files: debian/*
Copyright: 2020, C
License: Expat

License: CC-BY-4.0
 Files: are words in here too.
 .
 And so is Copyright: nothing.
"""


def photograph(path, size=(90, 70), seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise).save(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Five photographs."""
    home = tmp_path_factory.mktemp("photographs")
    for i in range(5):
        photograph(home / f"{i}.png", seed=i)
    return home


def test_a_debian_packages_photographs_carry_their_licence(tmp_path):
    for name in ("one_by_A", "two_by_A", "unlisted_by_D"):
        photograph(tmp_path / "backgrounds" / f"{name}.jpg")
    listing = tmp_path / "doc" / "lomiri-wallpapers-16.04" / "copyright"
    listing.parent.mkdir(parents=True)
    listing.write_text(COPYRIGHT)
    found, missing = photos.installed(tmp_path)
    found = [photo for photo in found if photo.source == "lomiri-wallpapers-16.04"]
    assert [photo.path.name for photo in found] == ["one_by_A.jpg", "two_by_A.jpg"]
    assert {(photo.author, photo.licence) for photo in found} == {("2018, A <a@example.org>; 2019, B", "CC-BY-4.0")}
    assert "mate-backgrounds" in missing and "lomiri-wallpapers-16.04" not in missing


def test_no_crop_of_a_held_out_photograph_is_trained_on(folder, tmp_path):
    found = photos.collect(str(folder))
    assert photos.build(found, tmp_path / "a", size=16, count=3, heldout=0.4, seed=1) == 15
    photos.build(found, tmp_path / "b", size=16, count=3, heldout=0.4, seed=1)
    rows = [json.loads(line) for line in (tmp_path / "a" / "metadata.jsonl").read_text().splitlines()]
    of = {split: {row["photo"] for row in rows if row["split"] == split} for split in ("train", "heldout")}
    assert len(of["heldout"]) == 2 and len(of["train"]) == 3 and not of["train"] & of["heldout"]
    for row in rows:
        left, top, right, bottom = row["box"]
        assert 0 <= left and 0 <= top and right <= 90 and bottom <= 70 and right - left == bottom - top >= 32
        assert (tmp_path / "a" / row["file_name"]).read_bytes() == (tmp_path / "b" / row["file_name"]).read_bytes()
    assert len(load_pictures(tmp_path / "a", 16, split="heldout")) == 6


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def test_a_crop_has_its_photographs_caption_and_class(tmp_path):
    for name in ("door/a.png", "door/b.png", "tree/c.png"):
        photograph(tmp_path / "mine" / name)
    (tmp_path / "mine" / "door" / "a.txt").write_text("a red door")
    photos.build(photos.collect(str(tmp_path / "mine")), tmp_path / "made", size=16, count=2, heldout=0)
    found = [(row["text"], row["texts"], row["label"], row["split"]) for row in rows_of(tmp_path / "made")]
    wanted = [(text, [text], label) for text, label in (("a red door", "door"), ("door", "door"), ("tree", "tree"))]
    assert found == [(*each, "train") for each in wanted for _ in range(2)]
    pictures = load_pictures(tmp_path / "made", 16, captions=True)  # which speaks for all of them
    assert {row["label"] for row in pictures.rows} == {"door", "tree"}


def test_boxes_of_a_photograph_are_not_those_of_its_crops(tmp_path):
    photograph(tmp_path / "a.png")
    line = {"file_name": "a.png", "texts": ["one", "two"], "objects": [{"box": [0, 0, 1, 1]}], "place": "Rome"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(line))
    photos.build(photos.collect(str(tmp_path)), tmp_path / "made", size=16, count=1, heldout=0)
    (row,) = rows_of(tmp_path / "made")
    assert row["texts"] == ["one", "two"] and row["place"] == "Rome" and "objects" not in row
    assert row["file_name"] == "000-0000.png" and row["photo"] == "a.png"


def test_the_splits_that_a_folder_has_stay(tmp_path):
    for name in ("train/a.png", "train/b.png", "test/c.png"):
        photograph(tmp_path / name)
    found = photos.collect(str(tmp_path))
    assert {photo.path.name: split for photo, split in zip(found, photos.split_of(found, 0.5, 0), strict=True)} == {
        "a.png": "train",
        "b.png": "train",
        "c.png": "test",
    }


@pytest.mark.parametrize(
    ("name", "caption"),
    [("china", "china"), ("Foggy_Forest_by_A", "foggy forest"), ("GreenMeadow", "green meadow"), ("a-b  c", "a b c")],
)
def test_an_installed_photographs_caption_is_its_name(name, caption, tmp_path):
    assert photos._named(tmp_path / f"{name}.jpg") == {"text": caption, "texts": [caption]}


def test_crops_show_the_photograph(tmp_path):
    Image.fromarray(np.full((50, 80, 3), (200, 30, 90), np.uint8)).save(tmp_path / "plain.png")
    photo = photos.in_folder(tmp_path)[0]
    for box, crop in photos.crops(photo, 16, 4, random.Random(0)):
        assert crop.size == (16, 16) and box[2] - box[0] <= 50
        assert (np.array(crop) == (200, 30, 90)).all()


def test_mistakes_are_explained(folder, tmp_path, capsys, monkeypatch):
    with pytest.raises(FileNotFoundError, match="holds no pictures"):
        photos.collect(str(tmp_path))
    with pytest.raises(ValueError, match=r"heldout=1.5 must be at least 0 and below 1"):
        photos.split_of(photos.in_folder(folder), 1.5, 0)
    with pytest.raises(ValueError, match="a split by photograph needs two; --heldout 0 makes none"):
        photos.split_of(photos.in_folder(folder)[:1], 0.5, 0)
    with pytest.raises(ValueError, match="size=0"):
        photos.build(photos.in_folder(folder), tmp_path, size=0)
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(FileExistsError, match="exists and is not empty"):
        photos.build(photos.in_folder(folder), tmp_path, size=16, count=1)
    some = photos.in_folder(folder)
    monkeypatch.setattr(photos, "installed", lambda: (some, ["mate-backgrounds"]))
    assert photos.collect() == some
    assert "without mate-backgrounds (apt install mate-backgrounds)" in capsys.readouterr().err
    monkeypatch.setattr(photos, "installed", lambda: ([], list(photos.SOURCES)))
    with pytest.raises(FileNotFoundError, match="apt install lomiri.*scikit-learn.*--photos FOLDER"):
        photos.collect()


class Distance(torch.nn.Module):
    name = "distance"

    def forward(self, x, y):
        return (x - y).abs().mean(dim=(1, 2, 3))


def test_the_table_of_autoencoders(folder, tmp_path, monkeypatch, capsys):
    data = tmp_path / "data"
    assert main(["data", "photos", str(data), "--photos", str(folder), "--size", "16", "--crops", "4"]) == 0
    short = dataclasses.replace(TINY, steps=1, save_every=1, log_every=1)
    train_autoencoder.train(data, tmp_path / "kl", dataclasses.replace(short, adversarial=0.5), quiet=True)
    train_autoencoder.train(data, tmp_path / "vq", dataclasses.replace(short, family="vq"), quiet=True)
    report = autoencoders.evaluate([tmp_path / "kl", tmp_path / "vq"], data, scorer=Distance())
    assert report["pictures"] == 4 and report["distance"] == "distance"
    kl, vq = report["rows"]
    assert (kl["family"], vq["family"], kl["codes"], vq["codes"], vq["f"]) == ("kl", "vq", None, 32, 2)
    assert kl["adversarial"] == 0.5 and 0 < vq["used"] <= 1 and kl["distance"] > 0 and "used" not in kl
    monkeypatch.setattr(perceptual, "make_scorer", Distance)
    capsys.readouterr()
    command = ["evaluate-autoencoder", str(tmp_path / "kl"), str(tmp_path / "vq"), "--data", str(data)]
    assert main([*command, "--output", str(tmp_path / "table.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "distance distance" in lines[0] and lines[2].startswith("| kl | 2 | 2 channels | 1 | on |")
    assert lines[3].startswith("| vq | 2 | 2 channels, 32 codes | 1 | off |")
    assert lines[3].count("|") == lines[0].count("|")
    assert json.loads((tmp_path / "table.json").read_text()) == report
    assert main([*command, "--split", "none"]) == 2 and main([*command, "--count", "0"]) == 2


@pytest.mark.parametrize("part", ["perceptual", "discriminator_features"])
def test_a_model_is_not_scored_by_its_teacher(part, folder, tmp_path):
    (tmp_path / "autoencoder.json").write_text(json.dumps({part: "distance"}))
    (tmp_path / "decoder.json").write_text(json.dumps({part: "none"}))  # trained again since, without it
    c = dataclasses.replace(TINY, steps=1)
    train_autoencoder.build(c).save_pretrained(tmp_path / "vae")
    with pytest.raises(ValueError, match="was trained with distance; score it with another"):
        autoencoders.evaluate([tmp_path], folder, scorer=Distance())
