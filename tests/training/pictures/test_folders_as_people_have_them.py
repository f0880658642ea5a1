"""A folder as people have it, from the command line: looked at, trained on, gone on with, drawn from."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from ldmfast.commands.cli import main
from ldmfast.training import checkpoint

BRIEF = ["--batch", "2", "--warmup", "0", "--quiet", "--precision", "fp32"]
BROKEN = ("damaged.jpg", "half.jpg", "empty.png", "page.jpg", "odd.txt")


def noise(seed, mode="RGB", size=(20, 12)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).convert(mode)


@pytest.fixture
def folder(tmp_path):
    """16 pictures to train on in all forms, five that are broken, two of another split, and what is no picture."""
    home = tmp_path / "Bilder für später"
    (home / "train" / "Zoë's").mkdir(parents=True)
    (home / "test").mkdir()
    train, frames = home / "train", [noise(i) for i in range(3)]
    for i, name in enumerate(("été.jpg", "猫.png", "🐈.webp", "# 100%.JPG", "Zoë's/a.bmp", "a.gif", "a b.tiff")):
        noise(i).save(train / name)
    frames[0].save(train / "moving.gif", save_all=True, append_images=frames[1:])
    frames[0].save(train / "moving too.webp", save_all=True, append_images=frames[1:])
    noise(20, "CMYK").save(train / "cmyk.jpg")
    Image.fromarray(np.arange(240, dtype=np.uint16).reshape(12, 20) * 250).save(train / "deep.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    noise(21).save(train / "turned.jpg", exif=turned)
    clear = noise(22, "RGBA")
    clear.putalpha(100)
    clear.save(train / "clear.png")
    noise(23, "P").save(train / "palette.png")
    noise(24, size=(400, 4)).save(train / "wide.png")
    noise(25, size=(2500, 2000)).save(train / "huge.png", compress_level=1)
    noise(26).save(train / "half.jpg")
    (train / "half.jpg").write_bytes((train / "half.jpg").read_bytes()[:-200])
    (train / "damaged.jpg").write_bytes(b"\xff\xd8\xff\xe0 no picture")
    (train / "empty.png").write_bytes(b"")
    (train / "page.jpg").write_bytes(b"<html>")
    noise(27).save(train / "odd.png")
    for path in [path for path in train.rglob("*") if path.is_file()]:
        path.with_suffix(".txt").write_text(f"a picture of {path.stem}", encoding="utf-8")
    (train / "odd.txt").write_bytes(b"caf\xe9")
    for name in ("a.png", "b.png"):
        noise(30).save(home / "test" / name)
    for name in ("photo.heic", "notes.docx", ".DS_Store", "._a.png", "Thumbs.db"):
        (train / name).write_bytes(b"x")
    return home


@pytest.mark.filterwarnings("ignore:.*left out:UserWarning")
def test_it_is_looked_at_trained_on_gone_on_with_and_drawn_from(folder, tmp_path, capsys):
    run, data = tmp_path / "run", ["--data", str(folder)]
    assert main(["data", "inspect", str(folder), "--sheet", str(tmp_path / "seen.png")]) == 1
    said = capsys.readouterr().out
    assert "2 of split test, 16 of split train" in said and "trained on: 16, 0 of them without a caption" in said
    assert "not read: train/photo.heic" in said and all(name in said for name in BROKEN)

    shape = ["--size", "16", "--channels", "8,16", "--groups", "4", "--steps", "2"]
    autoencoder = ["train", "autoencoder", *data, *shape, *BRIEF, "--output", str(run)]
    assert main(autoencoder) == 2
    said = capsys.readouterr().err
    assert f"{len(BROKEN)} files or lines cannot be read" in said and all(name in said for name in BROKEN)
    assert not run.exists() or list(run.iterdir()) == []
    assert main([*autoencoder, "--skip-broken"]) == 0

    small = ["--channels", "16,16", "--attention", "0,1", "--groups", "8", "--head-width", "16", "--skip-broken"]
    denoiser = ["train", "denoiser", *data, "--autoencoder", str(run), *small, *BRIEF, "--output", str(run)]
    for steps in (2, 3):
        assert main([*denoiser, "--steps", str(steps)]) == 0
        assert checkpoint.load(run / "denoiser.pt")["step"] == steps
    assert f"{run / 'pipeline'}: loss" in capsys.readouterr().out

    drawn = ["sample", "a picture of 猫", "-o", str(tmp_path / "drawn.png"), "--model", str(run / "pipeline")]
    assert main([*drawn, "--steps", "2", "--quiet", "--scale", "1"]) == 0
    assert Image.open(tmp_path / "drawn.png").size == (16, 16)
