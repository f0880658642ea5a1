"""Commands as people type them: what is answered before anything heavy is imported, and in which words."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from PIL import Image

from ldmfast import shipped
from ldmfast.commands import cli
from ldmfast.commands.drawing import bounds
from ldmfast.commands.drawing.described import Described

CAT = ["sample", "a cat", "-o", "{tmp}/a.png"]
TRAIN = ["train", "autoencoder"]
SCENES = ["sample", "-o", "{tmp}/a.png"]


def mistakes():
    """(arguments, part of the answer) of what can be seen without the model."""
    return [
        (["sample"], "-o FILE is missing"),
        (["sample", "a cat"], "-o FILE is missing"),
        ([*CAT, "--scale", "1000"], "--scale 1000 must be at least 1, and at most 64"),
        ([*CAT, "--scale", "32", "-n", "100"], "at most 128 million in all are written"),
        (
            ["sample", "a cat", "-o", "{tmp}/a.webp", "--scale", "32", "-n", "6", "--columns", "6"],
            "16383 a side for .webp",
        ),
        ([*CAT, "--size", "100000x100000"], "at most 16384 pixels a side"),
        ([*CAT, "--size", "0x64"], "must be multiples of"),
        ([*CAT, "--size", "65x64"], "must be multiples of"),
        ([*CAT, "-n", "100000"], "--number 100000 must be at least 1, and at most"),
        ([*CAT, "-n", "0"], "--number 0 must be at least 1"),
        ([*CAT, "--batch", "0"], "--batch 0 must be at least 1"),
        ([*CAT, "--steps", "0"], "--steps 0 must be at least 1"),
        ([*CAT, "--eta", "2"], "--eta 2.0 must be between 0 and 1"),
        ([*CAT, "--guidance", "nan"], "--guidance nan must be finite, and 0 or more"),
        ([*CAT, "--guidance-rescale", "-1"], "--guidance-rescale -1.0 must be between 0 and 1"),
        ([*CAT, "--seed", "-1"], "--seed -1 must lie between 0 and"),
        ([*CAT, "--strength", "0.5"], "--strength 0.5 says how much of --image is repainted"),
        ([*CAT, "--image", "{tmp}/none.png"], "none.png: no such file"),
        ([*CAT, "--mask", "{tmp}/none.png"], "none.png: no such file"),
        ([*CAT, "--device", "tpu"], "--device tpu is none of cpu, cuda, cuda:1"),
        ([*CAT, "--model", "{tmp}/none"], "is neither a file nor a folder; the models that ship are"),
        (["sample", " ", "-o", "{tmp}/a.png"], "the prompt is empty"),
        (["sample", "a cat", "-o", "{tmp}/a.tiff"], "a picture's name ends in"),
        (["sample", "a cat", "-o", "{tmp}/none/a.png"], "cannot be written"),
        ([*SCENES, "--class", "cta"], "--class: no class 'cta'; did you mean 'cat'?"),
        ([*SCENES, "--class", "cat", "--map", "a.png", "b.png"], "--class 1, --map 2: give as many of each"),
        ([*SCENES, "--boxes", "{tmp}/none.json"], "No such file"),
        ([*SCENES, "--map", "{tmp}/none.png"], "No such file"),
        ([*TRAIN, "--data", "{tmp}/none", "--output", "{tmp}/x"], "none is not a folder of pictures"),
        ([*TRAIN, "--data", "{tmp}", "--output", __file__ + "/x"], f"cannot be written: {__file__} is a file"),
        ([*TRAIN, "--data", "{tmp}", "--output", "{tmp}/x", "--size", "65"], "size=65 is not divisible by f=4"),
        ([*TRAIN, "--data", "{tmp}", "--output", "{tmp}/x", "--recipe", "none"], "no recipe 'none'"),
        (["sample", "--example", "cake", "{tmp}"], "--example cake is none of boxes, map, mask, picture"),
    ]


@pytest.mark.parametrize(("arguments", "message"), mistakes())
def test_a_mistake_gets_one_sentence(tmp_path, capsys, arguments, message):
    assert cli.main([a.format(tmp=tmp_path) for a in arguments]) == 2
    said = capsys.readouterr().err.strip()
    assert message in said and said.startswith("ldmfast: ") and len(said.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_mistakes_are_answered_without_torch(tmp_path):
    """All of them in one process that never imports it; nor do help, version, lists and examples."""
    asked = [[a.format(tmp=tmp_path) for a in arguments] for arguments, _ in mistakes()]
    asked += [[], ["--version"], ["train"], ["data"], ["sample", "--list"], ["recipes"]]
    asked += [["sample", "--example", name, str(tmp_path)] for name in ("boxes", "map", "mask", "picture")]
    code = (
        "import sys, json\nfrom ldmfast.commands import cli\n"
        "for arguments in json.loads(sys.argv[1]):\n"
        "    try: cli.main(arguments)\n"
        "    except SystemExit as left: assert not left.code, arguments\n"
        "    assert 'torch' not in sys.modules and 'diffusers' not in sys.modules, arguments\n"
    )
    done = subprocess.run([sys.executable, "-c", code, json.dumps(asked)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_command_alone_shows_what_there_is(capsys):
    for arguments, word in (([], "sample"), (["train"], "denoiser"), (["data"], "scenes")):
        with pytest.raises(SystemExit) as left:
            cli.main(arguments)
        said = capsys.readouterr()
        assert left.value.code == 0 and word in said.out and said.err == ""


def test_version(capsys):
    from importlib.metadata import version

    from ldmfast import __version__

    with pytest.raises(SystemExit) as left:
        cli.main(["--version"])
    said = capsys.readouterr().out
    assert left.value.code == 0
    assert said.startswith(f"ldmfast {__version__} (torch {version('torch')}") and len(said.splitlines()) == 1


def test_memory_that_is_not_there_is_seen_before_it_is_taken(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bounds, "free_memory", lambda: 2**30)
    monkeypatch.setattr(bounds, "DRIVER", tmp_path / "none")
    asked = [*CAT[:3], str(tmp_path / "a.png"), "--size", "8192x8192"]
    assert cli.main(asked) == 2
    said = capsys.readouterr().err
    assert "a picture of 8192x8192 takes about" in said and "1.0 GiB are free: lower --size" in said
    assert cli.main([*asked[:-1], "1024x1024", "-n", "100", "--batch", "100"]) == 2
    assert "100 pictures of 1024x1024 takes about" in capsys.readouterr().err
    model = Described((64, 64), 4, 32)
    assert bounds.batch_that_fits(None, (64, 64), model, "float32", "cpu") == bounds.BATCH
    assert bounds.batch_that_fits(None, (512, 512), model, "float32", "cpu") == 4
    assert bounds.batch_that_fits(None, (512, 512), model, "bfloat16", "cpu") == 8
    assert bounds.batch_that_fits(7, (8192, 8192), model, "float32", "cuda") == 7  # nothing is known of its memory


def test_free_memory_is_some_of_the_machines():
    assert 2**20 < bounds.free_memory() < 2**44


def test_a_full_memory_is_a_sentence(monkeypatch, capsys, tmp_path):
    def full(*_):
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: 1099511 bytes"
        )

    monkeypatch.setattr("ldmfast.commands.sample.pipeline", full)
    assert cli.main([a.format(tmp=tmp_path) for a in CAT]) == 2
    assert "the memory is full" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_sizes_that_a_folder_states_are_those_of_its_networks():
    from ldmfast.commands.drawing.described import described
    from ldmfast.models.encode_decode import downsampling
    from ldmfast.pipeline import LatentDiffusionPipeline

    pipe = LatentDiffusionPipeline.from_pretrained(shipped.SCENES)
    found = described(shipped.SCENES)
    assert found == Described.of_configs(pipe.unet.config, pipe.vae.config)
    assert found.factor == downsampling(pipe.vae)
    assert found.trained == pipe({"class": "cat"}, steps=1)[0].size


def test_examples_are_drawn_from(tmp_path, capsys, monkeypatch):
    """Each with the command that it names."""
    import shlex

    monkeypatch.chdir(tmp_path)
    for name in ("boxes", "map", "mask", "picture"):
        assert cli.main(["sample", "--example", name, "in"]) == 0
        *files, tried = capsys.readouterr().out.splitlines()
        assert all((tmp_path / file).is_file() for file in files)
        program, *arguments = shlex.split(tried.removeprefix("try: "))
        assert program == "ldmfast" and cli.main([*arguments, "--steps", "2", "--quiet"]) == 0
        said = capsys.readouterr()
        assert said.err == "" and Image.open(tmp_path / said.out.strip()).size[0] >= 64
    lines = (tmp_path / "in" / "palette.txt").read_text().splitlines()
    assert "#de4c4a red ground" in lines and len(lines) == 30


def test_a_class_may_be_given_twice(tmp_path):
    out = tmp_path / "a.png"
    assert cli.main(["sample", "--class", "cat", "--class", "dog", "-o", str(out), "--steps", "1", "--quiet"]) == 0
    width, height = Image.open(out).size
    assert (width, height) == (64, 2 * 64 + 4)


def test_a_prompt_beside_boxes_is_answered_in_words(tmp_path, capsys):
    assert cli.main(["sample", "--example", "boxes", str(tmp_path)]) == 0
    asked = ["sample", "a cat", "--boxes", str(tmp_path / "boxes.json"), "-o", str(tmp_path / "a.png")]
    assert cli.main(asked) == 2
    assert "this model takes no prompt beside --class or --boxes or --map: leave out 'a cat'" in capsys.readouterr().err
    assert cli.main(["sample", "a cat", "--model", shipped.SCENES, "-o", str(tmp_path / "a.png")]) == 2
    assert "this model takes no prompt: leave out 'a cat'" in capsys.readouterr().err


def test_plms_in_few_steps_is_said(tmp_path, capsys):
    asked = ["sample", "a cat", "-o", str(tmp_path / "a.png"), "--quiet", "--sampler", "plms", "--steps"]
    assert cli.main([*asked, "3"]) == 0
    assert "plms overshoots in 3 steps" in capsys.readouterr().err
    assert cli.main([*asked, "16"]) == 0
    assert capsys.readouterr().err == ""


def test_a_prompt_that_is_cut_is_said_shortly(tmp_path, capsys):
    asked = ["sample", "a cat on a blue background " * 400, "-o", str(tmp_path / "a.png"), "--quiet", "--steps", "1"]
    assert cli.main(asked) == 0
    (said,) = capsys.readouterr().err.splitlines()
    assert "the text encoder reads" in said and len(said) < 160


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["sampel"], "ldmfast: sampel is none of sample, evaluate, "),
        (["sampel"], "; did you mean sample?; `ldmfast --help` lists"),
        (
            ["train", "autoencodr"],
            "ldmfast train: autoencodr is none of autoencoder, decoder, denoiser, scenes, lora; ",
        ),
        (["train", "lora"], "ldmfast train lora: the following arguments are required: --data, --output; `ldmfast tr"),
        (["sample", "a cat", "--stpes", "3"], "unrecognized arguments: --stpes 3; did you mean --steps?; "),
        (["sample", "a cat", "--nothing-like-it"], "unrecognized arguments: --nothing-like-it; `ldmfast --help`"),
    ],
)
def test_a_word_or_option_that_is_nearly_right_is_answered_with_it(arguments, said, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(arguments)
    found = capsys.readouterr().err
    assert left.value.code == 2 and said in found and len(found.splitlines()) == 1


def test_a_warning_is_a_line_without_a_place_in_the_code(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(folder / name)
    (folder / "c.heic").write_bytes(b"")
    command = [sys.executable, "-m", "ldmfast", "data", "photos", str(tmp_path / "made"), "--photos", str(folder)]
    done = subprocess.run([*command, "--size", "4", "--crops", "1"], capture_output=True, text=True)
    what = "1 of a kind that is not read, left out: c.heic; save them as PNG or JPEG"
    assert (done.returncode, done.stderr) == (0, f"ldmfast: {folder}: {what}\n")


def test_other_packages_warnings_stay_as_python_has_them():
    given = (UserWarning("odd"), UserWarning, "/usr/lib/python3/other.py", 7)
    assert cli._warned(*given).startswith("/usr/lib/python3/other.py:7: UserWarning: odd")
    assert cli._warned(given[0], given[1], cli.__file__, 7) == "ldmfast: odd\n"


def test_a_folder_that_may_not_be_written_to_is_named(tmp_path, capsys, monkeypatch):
    mine = tmp_path / "mine"
    mine.mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: path != mine)  # root may write everywhere
    assert cli.main([*TRAIN, "--data", str(tmp_path), "--output", str(mine / "a" / "b")]) == 2
    assert f"cannot be written: no permission to write to {mine}" in capsys.readouterr().err
