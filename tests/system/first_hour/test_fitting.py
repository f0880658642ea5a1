"""Pictures, masks and maps of other sizes than the model's; a map in other colours; the film of the steps."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw

from ldmfast.commands import cli
from ldmfast.commands.drawing import fitting, palette
from ldmfast.commands.drawing.described import described
from ldmfast.commands.drawing.film import FRAMES, Film

SIZE = described(None).trained
PROMPT = "a red apple on a yellow background"


def pixels(path):
    with Image.open(path) as opened:
        return np.asarray(opened.convert("RGB")).astype(int)


@pytest.fixture(scope="module")
def apple(tmp_path_factory):
    """What `sample` itself writes, at the model's size and enlarged."""
    folder = tmp_path_factory.mktemp("drawn")
    for name, scale in (("own", "1"), ("large", "4")):
        asked = ["sample", PROMPT, "-o", str(folder / f"{name}.png"), "--scale", scale, "--quiet"]
        assert cli.main([*asked, "--steps", "10"]) == 0
    return folder


def test_a_picture_is_written_at_the_models_size(apple):
    assert Image.open(apple / "own.png").size == SIZE
    assert Image.open(apple / "large.png").size == tuple(4 * side for side in SIZE)


def test_from_our_own_enlarged_picture_almost_the_same_is_drawn(apple, tmp_path, capsys):
    drawn = []
    for name in ("own", "large"):
        out = tmp_path / f"{name}.png"
        asked = ["sample", PROMPT, "-o", str(out), "--image", str(apple / f"{name}.png"), "--strength", "0.3"]
        assert cli.main([*asked, "--steps", "10", "--quiet"]) == 0
        drawn.append(pixels(out))
    said = capsys.readouterr().err.splitlines()
    width, height = SIZE
    assert said == [
        f"ldmfast: {apple}/large.png is {4 * width}x{4 * height} pixels: scaled to {width}x{height}, {fitting.MODEL}"
    ]
    assert drawn[0].shape == drawn[1].shape == (height, width, 3)
    assert np.abs(drawn[0] - drawn[1]).mean() < 4
    assert np.abs(drawn[1] - pixels(apple / "own.png")).mean() < 16  # it is that apple


def test_a_mask_of_another_size_is_fitted_with_its_picture(apple, tmp_path, capsys):
    mask = Image.new("L", (512, 512))
    ImageDraw.Draw(mask).rectangle((256, 0, 511, 511), 255)
    mask.save(tmp_path / "mask.png")
    out = tmp_path / "a.png"
    asked = ["sample", "a cat on a blue background", "-o", str(out), "--image", str(apple / "own.png")]
    assert cli.main([*asked, "--mask", str(tmp_path / "mask.png"), "--steps", "3", "--quiet"]) == 0
    assert "mask.png is 512x512 pixels: scaled to" in capsys.readouterr().err
    half = SIZE[0] // 2
    assert (pixels(out)[:, :half] == pixels(apple / "own.png")[:, :half]).all()
    assert (pixels(out)[:, half:] != pixels(apple / "own.png")[:, half:]).any()


def test_a_wide_picture_loses_its_sides_and_says_how_to_keep_them(tmp_path):
    wide = Image.new("RGB", (300, 100), "blue")
    ImageDraw.Draw(wide).rectangle((100, 0, 199, 99), "red")
    wide.save(tmp_path / "wide.png")
    (image, mask), said = fitting.fit_pictures(str(tmp_path / "wide.png"), None, (64, 64), fitting.MODEL)
    assert mask is None and image.size == (64, 64) and np.asarray(image)[32, 4:60].tolist() == [[255, 0, 0]] * 56
    assert said == [
        f"{tmp_path}/wide.png is 300x100 pixels: its middle, scaled to 64x64, the model's size "
        "(--size 112x36 would keep all of it)"
    ]
    (image, _), said = fitting.fit_pictures(str(tmp_path / "wide.png"), None, (300, 100), fitting.ASKED)
    assert image.size == (300, 100) and said == []


def test_a_mask_of_another_shape_is_refused(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "image.png")
    Image.new("L", (100, 50), 255).save(tmp_path / "mask.png")
    with pytest.raises(ValueError, match="mask.png is 100x50 pixels and .*image.png 64x64: a mask has the shape"):
        fitting.fit_pictures(str(tmp_path / "image.png"), str(tmp_path / "mask.png"), (64, 64), fitting.MODEL)


def test_no_line_of_a_mask_is_lost():
    mask = Image.new("L", (640, 640))
    ImageDraw.Draw(mask).line((100, 0, 100, 639), 255, width=1)
    small = np.asarray(fitting.fit_mask(mask, (64, 64)))
    assert set(np.unique(small)) == {0, 255} and (small[:, 10] == 255).all() and small.sum() == 64 * 255
    assert fitting.fit_mask(mask, (640, 640)) is mask


PALETTE = {"red ground": (222, 76, 74), "dog": (140, 63, 63)}


def a_map(share, colour=(0, 0, 255)):
    """A map of the first class with so many of its pixels in another colour."""
    values = np.full((100, 100, 3), PALETTE["red ground"], np.uint8)
    values.reshape(-1, 3)[: round(10000 * share)] = colour
    return Image.fromarray(values)


def test_a_map_in_other_colours_is_refused_with_the_palette():
    names, colours = list(PALETTE), list(PALETTE.values())
    assert palette.check_colours(a_map(0), "map.png", names, colours) == ""
    assert palette.check_colours(a_map(1, (225, 80, 70)), "map.jpg", names, colours) == ""  # a JPEG's
    said = palette.check_colours(a_map(0.01), "map.png", names, colours)
    assert said == "map.png: 1.0 % of its pixels have no colour of the palette; the nearest counts"
    with pytest.raises(ValueError) as error:
        palette.check_colours(a_map(0.5), "map.png", names, colours)
    assert str(error.value) == (
        "map.png: 50 % of its pixels have no colour of the palette, most of them #0000ff; "
        "the palette: red ground #de4c4a, dog #8c3f3f"
    )


def test_a_map_of_another_size_and_one_in_other_colours(tmp_path, capsys):
    asked = ["--quiet", "--steps", "1", "-o", str(tmp_path / "a.png")]
    Image.new("RGB", (400, 400), PALETTE["red ground"]).save(tmp_path / "large.png")
    assert cli.main(["sample", "--map", str(tmp_path / "large.png"), *asked]) == 0
    assert "large.png is 400x400 pixels: scaled to" in capsys.readouterr().err
    Image.new("RGB", (64, 64), (1, 2, 3)).save(tmp_path / "strange.png")
    assert cli.main(["sample", "--map", str(tmp_path / "strange.png"), *asked]) == 2
    said = capsys.readouterr().err
    assert "100 % of its pixels have no colour of the palette, most of them #010203" in said and "dog #8c3f3f" in said


def test_the_film_shows_the_steps_and_ends_with_the_picture(tmp_path, capsys):
    out, film = tmp_path / "a.png", tmp_path / "steps.png"
    asked = [
        "sample",
        PROMPT,
        "-o",
        str(out),
        "--film",
        str(film),
        "--steps",
        "9",
        "-n",
        "3",
        "--batch",
        "2",
        "--quiet",
    ]
    assert cli.main(asked) == 0
    assert capsys.readouterr().out.split() == [str(out), str(film)]
    strip, (width, height) = pixels(film), SIZE
    assert strip.shape == (height, FRAMES * (width + 4) - 4, 3)
    assert (strip[:, -width:] == pixels(out)[:height, :width]).all()
    frames = [strip[:, i * (width + 4) :][:, :width] for i in range(FRAMES)]
    assert (frames[0] != frames[1]).any() and (frames[-2] != frames[-1]).any()


@pytest.mark.parametrize("steps", [1, 2, 7, 25, 50, 999])
def test_a_film_has_as_many_frames_as_there_are_steps_up_to_its_length(steps):
    film, picture = Film(steps), Image.new("RGB", (2, 2))
    for step in range(film.every, steps, film.every):
        film.take(step, steps, [picture])
    assert film.strip(picture).width == min(steps, FRAMES) * 6 - 4
