"""Collections as people have them: imagefolder's conventions, every kind of picture, and files that are damaged."""

from __future__ import annotations

import csv
import json
import warnings

import numpy as np
import pytest
from PIL import Image

from ldmfast.commands.cli import main
from ldmfast.data.collection import load_pictures, read_picture, read_rows
from ldmfast.data.photos import in_folder


def draw(*paths, colour="red", **settings):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), colour).save(path, **settings)


def jsonl(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def texts(folder, **settings):
    return {row["file_name"]: row["texts"] for row in load_pictures(folder, 8, **settings).rows}


# --- which pictures, with which caption, in which split ---------------------------------------------------------------


def test_split_folders_with_metadata_of_their_own(tmp_path):
    for split in ("train", "test"):
        draw(tmp_path / split / "a.png", tmp_path / split / "not named.png")
        jsonl(tmp_path / split / "metadata.jsonl", {"file_name": "a.png", "text": f"for {split}"})
    assert texts(tmp_path, split="train", captions=True) == {"train/a.png": ["for train"]}
    assert texts(tmp_path, split="test") == {"test/a.png": ["for test"]} == texts(tmp_path, split="heldout")


@pytest.mark.parametrize(
    "folder, split",
    [("train", "train"), ("Training", "train"), ("validation", "validation"), ("valid", "validation")]
    + [("val", "validation"), ("dev", "validation"), ("test", "test"), ("testing", "test"), ("eval", "test")],
)
def test_only_what_is_for_training_is_trained_on(tmp_path, folder, split):
    draw(tmp_path / "train" / "a.png", tmp_path / "data" / folder / "b.png")
    rows = {row["file_name"]: row["split"] for row in read_rows(tmp_path)}
    assert rows == {"train/a.png": "train", f"data/{folder}/b.png": split}
    held_out = load_pictures(tmp_path, 8).where(split="heldout")
    assert len(held_out) == (split != "train")


def test_a_listing_at_the_top_names_pictures_of_either_split(tmp_path):
    draw(tmp_path / "train" / "a.png", tmp_path / "test" / "b.png", tmp_path / "c.png")
    rows = [{"file_name": name} for name in ("train/a.png", "test/b.png")]
    jsonl(tmp_path / "metadata.jsonl", *rows, {"file_name": "c.png", "split": "val"})
    assert [row["split"] for row in read_rows(tmp_path)] == ["validation", "test", "train"]


def test_metadata_csv(tmp_path):
    draw(tmp_path / "a.png", tmp_path / "b.png")
    with open(tmp_path / "metadata.csv", "w", newline="", encoding="utf-8-sig") as file:
        lines = csv.writer(file)
        lines.writerows([["file_name", "text", "mood"], ["a.png", "a cat,\u2028on\na mat", "calm"], ["b.png", "", ""]])
    assert texts(tmp_path) == {"a.png": ["a cat,\u2028on\na mat"], "b.png": []}
    assert read_rows(tmp_path)[0]["mood"] == "calm" and "mood" not in read_rows(tmp_path)[1]


def test_class_folders_are_labels_and_captions(tmp_path):
    for split in ("train", "test"):
        draw(tmp_path / split / "red_apple" / "1.png", tmp_path / split / "dog" / "1.png")
    (tmp_path / "train" / "dog" / "1.txt").write_text("a dog that sits")
    rows = load_pictures(tmp_path, 8, split="train", captions=True).rows
    assert [(row["label"], row["texts"]) for row in rows] == [
        ("dog", ["a dog that sits"]),
        ("red_apple", ["red apple"]),
    ]


def test_folders_that_only_hold_pictures_are_no_classes(tmp_path):
    draw(tmp_path / "summer" / "a.png", tmp_path / "b.png")  # not at one depth
    assert texts(tmp_path) == {"b.png": [], "summer/a.png": []}
    (tmp_path / "b.png").unlink()  # one folder alone
    assert texts(tmp_path) == {"summer/a.png": []}


@pytest.mark.parametrize("suffix", ["gif", "tiff", "tif", "webp", "bmp", "ppm", "tga", "jpeg"])
def test_pictures_of_any_common_format_are_read(tmp_path, suffix):
    draw(tmp_path / f"a.{suffix}", tmp_path / f"B.{suffix.upper()}")
    assert np.allclose(load_pictures(tmp_path, 8).pixels[:, 0], 255, atol=2) and len(texts(tmp_path)) == 2


def test_pictures_that_are_not_read_are_named(tmp_path):
    draw(tmp_path / "a.png")
    for name in ("b.heic", "c.NEF"):
        (tmp_path / name).write_bytes(b"raw")
    with pytest.warns(UserWarning, match=r"2 of a kind that is not read, left out: b\.heic, c\.NEF"):
        assert texts(tmp_path) == {"a.png": []}


def test_hidden_files_are_passed_over(tmp_path):
    draw(tmp_path / "a.png", tmp_path / ".trash" / "b.png")
    for name in ("._a.png", "._a.txt", "._metadata.jsonl", "__MACOSX/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"\0\5\x16\7")
    assert texts(tmp_path) == {"a.png": []}
    assert [photo.path.name for photo in in_folder(tmp_path)] == ["a.png"]


# --- texts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("caption", ["a\u2028b", "a\u2029b", "a\x85b", "a\x0bb", "a\x1cb", "a\nb", "猫"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_captions_are_whole(tmp_path, caption, encoding):
    draw(tmp_path / "here" / "a.png", tmp_path / "there" / "b.png")
    line = json.dumps({"file_name": "a.png", "text": caption}, ensure_ascii=False)
    (tmp_path / "here" / "metadata.jsonl").write_bytes(f"{line}\r\n\r\n".encode(encoding))
    (tmp_path / "there" / "b.txt").write_bytes(f"{caption}\r\n".encode(encoding))
    assert texts(tmp_path, captions=True) == {"here/a.png": [caption], "there/b.png": [caption]}


WRONG = {
    "[1]": "expected an object with file_name and text",
    "{": "expected an object with file_name and text",
    '{"file_name": null}': "file_name is None, expected a string",
    '{"file_name": ""}': "file_name is '', expected a string",
    '{"file_name": "a.png", "text": 5}': "text is 5, expected a string",
    '{"file_name": "a.png", "text": ["a cat"]}': "text is ['a cat'], expected a string",
    '{"file_name": "a.png", "texts": "a cat"}': "texts is 'a cat', expected a list of strings",
    '{"file_name": "a.png", "texts": ["a cat", NaN]}': "an entry of texts is nan, expected a string",
    '{"file_name": "a.png", "split": 1}': "split is 1, expected a string",
    r'{"file_name": "a.png", "text": "a \ud83d"}': r"text is 'a \ud83d', which has half of a pair of surrogates",
}


def test_every_wrong_line_is_named_with_what_is_wrong(tmp_path):
    draw(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text("\n".join(['{"file_name": "a.png"}', *WRONG]))
    with pytest.raises(ValueError) as error:
        read_rows(tmp_path)
    lines = str(error.value).splitlines()
    assert lines[0] == f"{tmp_path}: {len(WRONG)} files or lines cannot be read:"
    named = [f"  {tmp_path / 'metadata.jsonl'}, line {n}: {text}" for n, text in enumerate(WRONG.values(), 2)]
    assert lines[1:] == named


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("metadata.csv", b"name;text\na.png;x", "metadata.csv, line 1: no column is named file_name"),
        ("metadata.csv", b"file_name,text\na.png,a,b", "metadata.csv, line 2: expected an object"),
        ("metadata.csv", b'file_name,text\na.png,"a', "metadata.csv, line 2: unexpected end of data"),
        ("metadata.jsonl", b'{"file_name": "a.png", "text": "\xff"}', "jsonl is not UTF-8 text: invalid start"),
        ("metadata.jsonl", b"[" * 10**5, "line 1: expected an object"),
        ("a.txt", b"caf\xe9", "a.txt is not UTF-8 text"),
        ("metadata.parquet", b"PAR1", "metadata.parquet: one file is read, metadata.jsonl or metadata.csv"),
    ],
)
def test_a_text_that_cannot_be_read_is_named(tmp_path, name, content, message):
    draw(tmp_path / "a.png")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_pictures(tmp_path, 8)


def test_of_many_wrong_lines_the_first_are_named(tmp_path):
    (tmp_path / "metadata.jsonl").write_text("x\n" * 50)
    with pytest.raises(ValueError, match=r"metadata\.jsonl: 30 more lines$"):
        read_rows(tmp_path)


def test_all_pictures_without_a_caption_are_named(tmp_path):
    draw(tmp_path / "a.png", tmp_path / "b.png")
    with pytest.raises(ValueError, match=r"a\.png, b\.png have no caption; write each as text"):
        load_pictures(tmp_path, 8, captions=True)


# --- damaged pictures -------------------------------------------------------------------------------------------------


def damaged(folder):
    """A collection of one good picture; returns the names of the others."""
    draw(folder / "good.png", folder / "cut.png", folder / "cut.jpg")
    for name in ("cut.png", "cut.jpg"):
        (folder / name).write_bytes((folder / name).read_bytes()[:-30])
    (folder / "page.png").write_bytes(b"<html>not found</html>")
    (folder / "empty.gif").write_bytes(b"")
    (folder / "folder.png").mkdir()
    rows = [{"file_name": path.name, "text": "red"} for path in sorted(folder.iterdir())]
    jsonl(folder / "metadata.jsonl", *rows, {"file_name": "absent.png"}, {"file_name": "a\0b.png"})
    return ["cut.png", "cut.jpg", "page.png", "empty.gif", "folder.png", "absent.png", "a\0b.png"]


def test_every_broken_file_is_named_or_left_out(tmp_path):
    names = damaged(tmp_path)
    with pytest.raises(ValueError) as error:
        load_pictures(tmp_path, 8)
    assert all(str(tmp_path / name) in str(error.value) for name in names)
    assert len(str(error.value).splitlines()) == 1 + len(names)
    with pytest.warns(UserWarning, match="left out of the training") as said:
        found = load_pictures(tmp_path, 8, skip_broken=True)
    assert [row["file_name"] for row in found.rows] == ["good.png"] and len(found.pixels) == 1
    assert all(str(tmp_path / name) in str(said[0].message) for name in names)
    (tmp_path / "good.png").unlink()
    with pytest.raises(ValueError, match="8 files or lines cannot be read"):
        load_pictures(tmp_path, 8, skip_broken=True)


def test_skip_broken_on_the_command_line(tmp_path, capsys):
    damaged(tmp_path / "pictures")
    small = "--steps 1 --size 8 --channels 8,8 --groups 4 --batch 1 --latent-channels 1 --precision fp32 --quiet"
    asked = ["train", "autoencoder", "--data", str(tmp_path / "pictures"), "--output", str(tmp_path / "run")]
    assert main([*asked, *small.split()]) == 2 and "cut.jpg is not a picture" in capsys.readouterr().err
    with pytest.warns(UserWarning, match="page.png is not a picture"):
        assert main([*asked, *small.split(), "--skip-broken"]) == 0


def test_inspect_says_what_would_be_trained_on(tmp_path, capsys):
    draw(
        tmp_path / "train" / "cat" / "1.png", tmp_path / "train" / "dog" / "1.png", tmp_path / "test" / "cat" / "2.png"
    )
    asked = ["data", "inspect", str(tmp_path), "--sheet", str(tmp_path / "sheet.png")]
    assert main(asked) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "1 of split test, 2 of split train" and said[2] == "classes: cat 1, dog 1"
    assert said[1] == "trained on: 2, 0 of them without a caption; 2 different captions"
    assert Image.open(tmp_path / "sheet.png").size == (2 * 64 + 4, 64)
    damaged(tmp_path / "damaged")
    assert main(["data", "inspect", str(tmp_path / "damaged")]) == 1
    assert sum(line.startswith("broken: ") for line in capsys.readouterr().out.splitlines()) == 7
    (tmp_path / "empty").mkdir()
    assert main(["data", "inspect", str(tmp_path / "empty")]) == 1
    assert capsys.readouterr().out == f"{tmp_path / 'empty'} holds no pictures\n"


@pytest.mark.parametrize("most", [10, 40])  # of 64 pixels: refused above twice as many, said to be one above
def test_a_decompression_bomb_is_named(tmp_path, monkeypatch, most):
    draw(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", most)
    if most == 10:
        with pytest.raises(ValueError, match=r"bomb\.png is not a picture that can be read: .*decompression bomb"):
            load_pictures(tmp_path, 8)
    else:
        with pytest.warns(Image.DecompressionBombWarning, match=r"bomb\.png: Image size \(64 pixels\)"):
            load_pictures(tmp_path, 8)


def test_no_damage_to_a_file_gives_another_error(tmp_path):
    rng, path = np.random.default_rng(0), tmp_path / "a"
    noise = Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8))
    read = 0
    for kind in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM", "TGA"):
        noise.save(path, format=kind, exif=Image.Exif())
        whole = path.read_bytes()
        for _ in range(60):
            data = bytearray(whole[: rng.integers(1, len(whole) + 1)] if rng.integers(2) else whole)
            for at in rng.integers(0, min(len(data), 200), rng.integers(0, 4)):
                data[at] = rng.integers(256)
            path.write_bytes(data)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    read += read_picture(path, 16).shape == (3, 16, 16)
            except ValueError as error:
                assert str(error).startswith(f"{path} is not a picture that can be read: ")
    assert 20 < read < 460
