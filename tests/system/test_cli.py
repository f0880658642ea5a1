"""The commands: what they write, and how they answer a mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from tiny import CUTOUTS

from ldmfast.commands import cli
from ldmfast.commands.drawing.described import described
from ldmfast.conditioning.base import Unconditional
from ldmfast.conditioning.classes_and_boxes import ClassEmbedder
from ldmfast.conditioning.spatial import LowResolution

PROMPT = "a red apple on a yellow background"
SIZE = described(None).trained


def test_sample_writes_a_picture(tmp_path, capsys):
    out = tmp_path / "apple.png"
    assert cli.main(["sample", PROMPT, "-o", str(out), "--steps", "2", "--quiet"]) == 0
    with Image.open(out) as picture:
        assert picture.size == SIZE and picture.format == "PNG"
    assert capsys.readouterr().out.strip() == str(out)
    assert [p.name for p in tmp_path.iterdir()] == ["apple.png"]


def test_sample_lays_out_a_grid(tmp_path):
    out = tmp_path / "grid.jpg"
    arguments = ["sample", PROMPT, "a cat", "-n", "3", "-o", str(out), "--steps", "1", "--scale", "2", "--quiet"]
    assert cli.main(arguments) == 0
    width, height = (2 * side for side in SIZE)
    with Image.open(out) as picture:
        assert picture.size == (3 * width + 2 * 4, 2 * height + 4) and picture.format == "JPEG"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sample", PROMPT, "-o", "{tmp}/a.png", "--steps", "5000"], "steps=5000 must lie between"),
        (["sample", "", "-o", "{tmp}/a.png"], "the prompt is empty"),
        (["sample", PROMPT, "-o", "{tmp}/none/a.png"], "cannot be written"),
        (["sample", PROMPT, "-o", "{tmp}"], "a picture's name ends in"),
        (["sample", PROMPT, "-o", "{tmp}/a.tiff"], "a picture's name ends in"),
        (["sample", PROMPT, "-o", "{tmp}/a.png", "-n", "0"], "--number 0"),
        (["sample", PROMPT, "-o", "{tmp}/a.png", "--scale", "0"], "--scale 0"),
        (["sample", PROMPT, "-o", "{tmp}/a.png", "--columns", "0"], "--columns 0"),
        (["sample", PROMPT, "-o", "{tmp}/a.png", "--model", "{tmp}"], "neither unet/config.json nor config.json"),
        (["evaluate", "--data", "{tmp}/none", "--quiet"], "not a folder of pictures"),
        (["evaluate", "--data", "{tmp}", "--samples", "0"], "samples=0"),
        (["evaluate", "--data", "{tmp}", "--inception", "{tmp}/none.pt"], "none.pt: no such file"),
        (["evaluate", "--font", "{tmp}/none.ttf"], "apt-get install fonts-noto-color-emoji"),
        (["data", "emoji", "{tmp}/new", "--cutouts", "{tmp}"], "holds none of the cut-outs"),
        (["train", "autoencoder", "--data", "{tmp}", "--output", "{tmp}"], "holds no pictures"),
        (["train", "autoencoder", "--data", "{tmp}", "--output", "{tmp}", "--steps", "0"], "steps=0 must be above 0"),
        (
            ["train", "autoencoder", "--data", "{tmp}", "--output", "{tmp}", "--lpips", "c"],
            "is not read by perceptual=none",
        ),
        (["evaluate-autoencoder", "a", "--data", "b", "--lpips", "c"], "is read only with --distance lpips-vgg"),
        (["train", "denoiser", "--data", "{tmp}", "--autoencoder", "{tmp}", "--output", "{tmp}"], "train it first"),
    ],
)
def test_a_mistake_gets_one_sentence(tmp_path, capsys, arguments, message):
    assert cli.main([a.format(tmp=tmp_path) for a in arguments]) == 2
    said = capsys.readouterr().err.strip()
    assert message in said and said.startswith("ldmfast: ") and len(said.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["draw"],
        ["sample", PROMPT, "-o", "a.png", "--steps", "many"],
        ["train", "denoiser", "--data", "a", "--autoencoder", "b", "--output", "c", "--prediction", "score"],
        ["train", "denoiser", "--data", "a", "--autoencoder", "b", "--output", "c", "--channels", "64;96"],
        ["train", "denoiser", "--data", "a", "--autoencoder", "b", "--output", "c", "--channels", "64.5,96"],
    ],
)
def test_unknown_words_and_values_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    assert exit_.value.code == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and said.startswith("ldmfast") and "--help` lists what there is" in said


@pytest.mark.parametrize(
    ("conditioner", "options", "message"),
    [
        (ClassEmbedder(2), ["--distances"], "--distances is for models of captions"),
        (ClassEmbedder(2), ["--inception", "a.pt"], "--inception is for models of captions"),
        (Unconditional(), [], "this model takes none of them"),
        (LowResolution(), [], "this model takes none of them"),
    ],
)
def test_evaluate_says_what_it_cannot_score(conditioner, options, message, monkeypatch, capsys):
    monkeypatch.setattr("ldmfast.commands.evaluate.pipeline", lambda _: SimpleNamespace(conditioner=conditioner))
    assert cli.main(["evaluate", *options]) == 2
    assert message in capsys.readouterr().err


def test_evaluate_prints_its_figures(tmp_path, capsys):
    few = tmp_path / "cutouts"
    few.mkdir()
    for name in ("lemon.png", "rocket.png"):
        (few / name).write_bytes((CUTOUTS / name).read_bytes())
    data, out = str(tmp_path / "data"), tmp_path / "figures.json"
    assert cli.main(["data", "emoji", data, "--cutouts", str(few), "--placements", "1"]) == 0
    assert "16 pictures" in capsys.readouterr().out
    evaluate = ["evaluate", "--data", data, "--samples", "2", "--steps", "2", "--output", str(out), "--quiet"]
    sheet = tmp_path / "sheet.png"
    assert cli.main([*evaluate, "--sheet", str(sheet)]) == 0
    assert Image.open(sheet).size == (4 * 132 - 4, 128)  # two of each split
    report = json.loads(out.read_text())
    assert report == json.loads(capsys.readouterr().out)
    for split in ("train", "heldout"):
        assert report[split]["reconstruction"]["psnr"] > 15
        assert set(report[split]["retrieval"]) == {"object", "colour", "all", "all, R@5"}


def test_training_through_the_command_line(tmp_path, capsys):
    few = tmp_path / "cutouts"
    few.mkdir()
    (few / "lemon.png").write_bytes((CUTOUTS / "lemon.png").read_bytes())
    data, run = str(tmp_path / "data"), str(tmp_path / "run")
    small = ["--data", data, "--output", run, "--steps", "2", "--batch", "2", "--warmup", "0", "--quiet"]
    network = ["--channels", "16,16", "--groups", "4"]
    assert cli.main(["data", "emoji", data, "--cutouts", str(few), "--placements", "1", "--size", "16"]) == 0
    assert cli.main(["train", "autoencoder", *small, *network, "--size", "16"]) == 0
    assert cli.main(["train", "decoder", *small, "--autoencoder", run]) == 0
    denoiser = ["train", "denoiser", *small, *network, "--autoencoder", run, "--attention", "0,1", "--head-width", "16"]
    assert cli.main(denoiser) == 0
    picture = str(tmp_path / "a.png")
    capsys.readouterr()
    assert cli.main(["sample", "a lemon", "--model", run + "/pipeline", "-o", picture, "--steps", "1", "--quiet"]) == 0
    assert Image.open(picture).size == (16, 16) and capsys.readouterr().err == ""
    assert cli.main(["sample", "--list", "--model", run + "/pipeline"]) == 0
    said = capsys.readouterr().out
    assert "1 objects: lemon" in said and "grounds: " in said and "red" in said
    Path(run, "denoiser.pt").write_bytes(b"not a checkpoint")
    assert cli.main(denoiser) == 2
    assert "denoiser.pt is damaged or no checkpoint" in capsys.readouterr().err


def test_help_loads_nothing_heavy():
    code = "import sys; from ldmfast.commands.cli import parser; parser().format_help(); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


def test_doctor_is_a_command_like_the_others(monkeypatch, capsys):
    from ldmfast.ops import self_check

    for right, code, said in ((True, 0, "everything that runs here is right"), (False, 1, "WRONG: see the rows")):
        monkeypatch.setattr(self_check, "rows", lambda op, dtype, right=right: [(f"{op.name} {dtype}", right)])
        assert cli.main(["doctor"]) == code
        assert said in capsys.readouterr().out
    with pytest.raises(SystemExit) as exit_:
        cli.main(["doctor", "--help"])
    assert exit_.value.code == 0
    assert "whether every op is right on this machine" in " ".join(capsys.readouterr().out.split())


def test_doctor_finds_this_machine_right(capsys):
    """It said that torch's LayerNorm was wrong: 64 % off in bfloat16, of a gradient that is 0 but for roundings."""
    assert cli.main(["doctor"]) == 0, capsys.readouterr().out


def test_doctor_checks_gradients(monkeypatch):
    import torch

    from ldmfast.ops import self_check
    from ldmfast.ops.registry import OPS

    op = OPS["ddim_step"]
    monkeypatch.setattr(op, "ranked", lambda: [op.backends["torch"]])
    ((row, right),) = self_check.rows(op, torch.float32)
    assert right and "right: error" in row and ", gradient " in row
    monkeypatch.setattr(self_check, "gradient_error", lambda *_: float("nan"))
    ((row, right),) = self_check.rows(op, torch.float32)
    assert not right and "WRONG" in row


def test_doctor_says_what_an_op_raises_and_goes_on(monkeypatch):
    import torch

    from ldmfast.ops import self_check
    from ldmfast.ops.registry import OPS

    def run(*args):
        raise TypeError("ddim_step: field N is missing")  # as the binding does

    op = OPS["ddim_step"]
    monkeypatch.setattr(op.backends["cpu"], "run", run)
    monkeypatch.setattr(op, "ranked", lambda: [op.backends["cpu"], op.backends["torch"]])
    rows = list(self_check.rows(op, torch.float32))
    assert [right for _, right in rows] == [False, True]
    assert "WRONG: TypeError: ddim_step: field N is missing" in rows[0][0]
