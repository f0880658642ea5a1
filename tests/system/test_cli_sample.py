"""`ldmfast sample` beyond a prompt: pictures, masks, samplers, classes, previews; on tiny saved pipelines."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from tiny_pipelines import class_conditional, half_mask, picture, unconditional

from ldmfast.commands import cli
from ldmfast.commands.drawing import fitting
from ldmfast.conditioning.spatial import LowResolution

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # numpy's, about diffusers


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    class_conditional().save_pretrained(folder / "class")
    unconditional().save_pretrained(folder / "nothing")
    unconditional(7, LowResolution(3)).save_pretrained(folder / "small")
    picture().save(folder / "image.png")
    picture(width=6, height=5).save(folder / "small.png")
    half_mask().save(folder / "mask.png")
    Image.new("L", (16, 16)).save(folder / "black.png")
    return folder


def draw(models, model, out, *arguments):
    return cli.main(["sample", "--model", str(models / model), "-o", str(out), "--quiet", "--steps", "2", *arguments])


def pixels(path):
    with Image.open(path) as opened:
        return np.asarray(opened).astype(int)


def test_a_class_by_any_sampler_at_any_size(models, tmp_path):
    out = tmp_path / "a.png"
    options = ["--sampler", "euler-a", "--guidance-rescale", "0.5", "--size", "24x8", "--scale", "1", "-n", "2"]
    assert draw(models, "class", out, "--class", "1", *options) == 0
    assert pixels(out).shape == (8, 2 * 24 + 4, 3)
    assert draw(models, "class", out, "--class", "0", "2", "--sampler", "ddim", "--eta", "1", "--scale", "1") == 0
    assert pixels(out).shape == (2 * 16 + 4, 16, 3)  # a row for each input


def test_from_a_picture_and_a_mask(models, tmp_path):
    begin, out = ["--class", "1", "--scale", "1", "--image", str(models / "image.png")], tmp_path / "a.png"
    assert draw(models, "class", out, *begin, "--mask", str(models / "mask.png")) == 0
    assert (pixels(out)[:, :8] == pixels(models / "image.png")[:, :8]).all()
    assert (pixels(out)[:, 8:] != pixels(models / "image.png")[:, 8:]).any()
    assert draw(models, "class", out, *begin, "--strength", "0.5", "--size", "8x12") == 0
    assert pixels(out).shape == (12, 8, 3)


def test_a_photograph_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: to be turned by 90 degrees
    Image.new("RGB", (12, 8)).save(tmp_path / "turned.png", exif=exif)
    assert fitting.unfitted(tmp_path / "turned.png", None)[0].size == (8, 12)


def test_a_picture_is_enlarged_by_a_model_for_that(models, tmp_path):
    out = tmp_path / "a.png"
    assert draw(models, "small", out, "--image", str(models / "small.png"), "--scale", "1") == 0
    assert pixels(out).shape == (20, 24, 3)
    assert draw(models, "small", out, "--image", str(models / "small.png"), "--size", "48x32") == 0
    assert pixels(out).shape == (32, 48, 3)


def test_without_a_prompt_and_enlarged_to_be_seen(models, tmp_path):
    out = tmp_path / "a.png"
    assert draw(models, "nothing", out, "--scale", "16") == 0
    assert pixels(out).shape == (256, 256, 3)


def test_a_picture_of_another_size_is_brought_to_the_models(models, tmp_path, capsys):
    out = tmp_path / "a.png"
    assert draw(models, "class", out, "--class", "1", "--image", str(models / "small.png")) == 0
    assert pixels(out).shape == (16, 16, 3)
    assert "small.png is 6x5 pixels: its middle, scaled to 16x16, the model's size" in capsys.readouterr().err


def test_previews_are_written_while_it_runs(models, tmp_path, monkeypatch):
    from ldmfast import pictures as files

    written, writing = [], files.writing

    def watched(path):
        written.append(str(path).rsplit("/", 1)[-1])
        return writing(path)

    monkeypatch.setattr(files, "writing", watched)
    assert draw(models, "nothing", tmp_path / "a.png", "--steps", "5", "--preview-every", "2") == 0
    assert written == ["a.png", "a.preview.png", "a.preview.png"]
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        ("class", ["--class", "1", "--strength", "0.5"], "--strength 0.5 says how much of --image is repainted"),
        ("class", ["--class", "1", "--image", "{m}/image.png", "--strength", "2"], "--strength 2.0 must lie"),
        ("class", ["--class", "1", "--image", "{m}/image.png", "--mask", "{m}/black.png"], "mask is empty"),
        ("class", ["--class", "1", "--size", "6x8"], "both sides must be multiples of 4"),
        ("class", ["--class", "3"], "a class must be a whole number from 0 to 2"),
        ("class", ["a cat"], "this model takes no prompt: leave out 'a cat'; it takes --class"),
        ("class", [], "nothing was asked for; it takes --class"),
        ("class", ["--class", "1", "--image", "{m}/none.png"], "no such file"),
        ("class", ["--class", "1", "--eta", "1", "--sampler", "plms", "--steps", "20"], "eta belongs to ddim"),
        ("class", ["--class", "1", "--device", "tpu"], "--device tpu is none of cpu, cuda"),
        ("class", ["--class", "1", "--preview-every", "0"], "--preview-every 0 must be at least 1"),
        ("nothing", ["a cat"], "this model takes no prompt: leave out 'a cat'"),
        ("small", [], "image is missing"),
    ],
)
def test_a_mistake_gets_one_sentence(models, tmp_path, capsys, model, arguments, message):
    assert draw(models, model, tmp_path / "a.png", *(a.format(m=models) for a in arguments)) == 2
    said = capsys.readouterr().err.strip()
    assert message in said and said.startswith("ldmfast: ") and len(said.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [["--size", "12by4"], ["--size", "1x2x3"], ["--sampler", "best"]])
def test_unknown_words_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        cli.main(["sample", "a cat", "-o", "a.png", *arguments])
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and said.startswith("ldmfast") and "--help` lists what there is" in said
