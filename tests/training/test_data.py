"""Picture collections: the emoji with their captions, and folders of one's own."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import CUTOUTS

from ldmfast.data import emoji, emoji_words
from ldmfast.data.collection import load_pictures, read_rows


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    folder = tmp_path_factory.mktemp("emoji") / "collection"
    emoji.build(emoji.folder_cutouts(CUTOUTS), folder, size=16, count=1)
    return folder


def test_every_object_has_one_ground_held_out(collection):
    rows = read_rows(collection)
    assert len(rows) == len(emoji_words.OBJECTS) * len(emoji.COLOURS) == 512
    held = Counter(row["object"] for row in rows if row["split"] == "heldout")
    assert len(held) == 64 and set(held.values()) == {1}
    grounds = Counter(row["colour"] for row in rows if row["split"] == "heldout")
    assert set(grounds) == set(emoji.COLOURS)


def test_captions_have_the_right_article():
    plain = {
        name: emoji_words.captions((name,), "orange")[0] for name in ("owl", "cat", "unicorn", "grapes", "umbrella")
    }
    assert plain == {
        "owl": "an owl on an orange background",
        "cat": "a cat on an orange background",
        "unicorn": "a unicorn on an orange background",
        "grapes": "grapes on an orange background",
        "umbrella": "an umbrella on an orange background",
    }


def test_the_whole_catalogue_has_600_objects_of_different_names():
    every = emoji_words.catalogue("all")
    assert len(every) == 600
    assert list(every)[:64] == list(emoji_words.OBJECTS)  # so that their held-out grounds stay
    names = [name.lower() for names in every.values() for name in names]
    assert len(set(names)) == len(names)
    assert len({emoji_words.file_stem(name) for name in names}) == len(names)
    assert all(name == name.strip() and "’" not in name for name in names)
    with pytest.raises(ValueError, match="objects='most' is none of 64, 320, all"):
        emoji_words.catalogue("most")


def test_articles_of_the_catalogue():
    said = {"bus": "a bus", "broccoli": "broccoli", "scissors": "scissors", "compass": "a compass", "dress": "a dress"}
    assert {name: emoji_words.with_article(name) for name in said} == said


def test_all_captions_of_an_object_name_it_and_its_ground():
    for text in emoji_words.captions(("red apple", "apple"), "yellow"):
        assert "apple" in text and "yellow" in text
    assert emoji_words.captions(("red apple", "apple"), "yellow")[0] == "a red apple on a yellow background"


def test_a_picture_shows_its_ground_in_the_corner(collection):
    pictures = load_pictures(collection, 16)
    for i in range(0, len(pictures), 37):
        ground = torch.tensor(emoji.COLOURS[pictures.rows[i]["colour"]])
        assert torch.equal(pictures.pixels[i, :, 0, 0].long(), ground)


def test_compose_leaves_no_dark_rim():
    # a white square whose transparent pixels are black: mixing without premultiplying would turn its rim grey
    cutout = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
    cutout.paste((255, 255, 255, 255), (5, 5, 35, 35))
    pixels = np.array(emoji.compose(cutout, "white", 16))
    assert pixels.min() >= 240


def test_build_refuses_a_folder_in_use(collection):
    with pytest.raises(FileExistsError, match="not empty"):
        emoji.build(emoji.folder_cutouts(CUTOUTS), collection, size=16, count=1)


def test_a_missing_font_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(emoji, "FONT_PATHS", ("/nowhere/NotoColorEmoji.ttf",))
    monkeypatch.delenv("LDMFAST_EMOJI_FONT", raising=False)
    with pytest.raises(FileNotFoundError, match="apt-get install fonts-noto-color-emoji"):
        emoji.font_cutouts()
    with pytest.raises(FileNotFoundError, match="other.ttf"):
        emoji.font_cutouts("/nowhere/other.ttf")


def test_the_cutouts_are_the_fonts():
    pytest.importorskip("fontTools")
    try:
        font = emoji.find_font()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    drawn, kept = emoji.font_cutouts(font), emoji.folder_cutouts(CUTOUTS)
    assert drawn.keys() == kept.keys()
    small = lambda pictures: np.stack([np.array(p.convert("RGBa").resize((8, 8)), float) for p in pictures])  # noqa: E731
    distance = np.abs(small(drawn.values())[:, None] - small(kept.values())[None]).mean(axis=(2, 3, 4))
    assert (distance.argmin(axis=1) == np.arange(len(drawn))).all()


def test_a_folder_of_pictures_with_captions_beside_them(tmp_path):
    Image.new("RGB", (40, 20), "red").save(tmp_path / "b.jpg")
    Image.new("RGBA", (20, 20), (0, 0, 0, 0)).save(tmp_path / "a.png")
    (tmp_path / "b.txt").write_text("a red wall\n")
    pictures = load_pictures(tmp_path, 8)
    assert [row["text"] for row in pictures.rows] == ["", "a red wall"]
    assert pictures.pixels.shape == (2, 3, 8, 8)
    assert pictures.pixels[0].min() == 255  # nothing, laid on white
    with pytest.raises(ValueError, match="a.png has no caption"):
        load_pictures(tmp_path, 8, captions=True)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metadata.jsonl", b'{"file_name": "a.png"}\nnot json\n', "line 2"),
        ("metadata.jsonl", b'{"text": "no file"}\n', "line 1"),
        ("metadata.jsonl", b'{"file_name": "a.png", "split": "test"}\n', "no pictures with split 'train'"),
        ("a.png", b"<html>not found</html>", "a.png is not a picture"),
        ("notes.txt", b"nothing to see", "holds no pictures"),
    ],
)
def test_a_bad_collection_is_explained(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_pictures(tmp_path, 8, split="train")


def test_a_missing_folder_is_explained(tmp_path):
    with pytest.raises(FileNotFoundError, match="not a folder"):
        load_pictures(tmp_path / "none", 8)


def test_metadata_rows_keep_their_labels(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    row = {"file_name": "a.png", "text": "night", "mood": "dark"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row) + "\n")
    pictures = load_pictures(tmp_path, 8, captions=True)
    assert pictures.rows[0]["texts"] == ["night"] and len(pictures.where(mood="dark")) == 1
