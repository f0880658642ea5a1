"""Every command and every line of Python in README and the pages that it links, run in an empty folder.

What is heavy runs on less. The published checkpoints are stand-ins of random weights, narrowed, under their names;
`OPTIONS` are added to each command that begins so; `make demo` is planned (`make -n`) and its call of ldmfast is run;
`make test` is what runs this; what `pip install` gets is what the photographs are told to be in, and is stood for by
four with captions; `accelerate launch` is run as one of the processes that it would start, and a pipeline
draws 64x64 pixels in two steps.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import test_door as door  # noqa: E402
import test_load as load  # noqa: E402
import test_zoo as zoo  # noqa: E402

from ldmfast.commands import cli  # noqa: E402
from ldmfast.data import photos  # noqa: E402
from ldmfast.pipeline import LatentDiffusionPipeline  # noqa: E402

ROOT = Path(__file__).resolve().parents[3]
FIRST = ROOT / "README.md"
BRIEF = "--steps 1 --batch 2 --warmup 0 --quiet"
SMALL = f"{BRIEF} --channels 16,16 --groups 4"
OPTIONS = {  # the longest that fits a command's beginning
    "sample": "--steps 2 --quiet",
    "sample --list": "",
    "sample --example": "",
    "data emoji": "--cutouts {few} --placements 1 --size 16",
    "data scenes": f"--cutouts {tiny.CUTOUTS} --count 100",
    "data photos": "--photos {photos} --size 16 --crops 2",
    "data inspect": "",
    "train autoencoder": f"{SMALL} --size 16 --perceptual none",
    "train denoiser": f"{SMALL} --attention 0,1 --head-width 16 --precision fp32 --layers 1",
    "train scenes": f"{SMALL} --attention 0,1 --head-width 16 --layers 1",
    "train lora": f"{BRIEF}",
    "evaluate": f"--samples 4 --steps 1 --quiet --cutouts {tiny.CUTOUTS}",
    "evaluate-autoencoder": "--count 2",
    "recipes": "",
    "convert": "",
    "verify": "--steps 1 --size 64",
}


def pages():
    """README, and the pages that it links."""
    links = re.findall(r"\]\(((?:bench|ldmfast)/[\w/]+\.md)\)", FIRST.read_text())
    return [FIRST, *(ROOT / link for link in dict.fromkeys(links))]


def blocks(page):
    """(language, text) of each fenced block."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def commands(text):
    """The commands of a sh block as lists of words, without comments."""
    return [words for line in text.replace("\\\n", " ").splitlines() if (words := shlex.split(line, comments=True))]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder with the checkpoints that the pages name, under those names; photographs, and four cut-outs."""
    home = tmp_path_factory.mktemp("published")
    door.stable_diffusion().save_pretrained(home / "path" / "to" / "stable-diffusion")
    load.save_file(load.small(), home / "v1-5-pruned-emaonly.safetensors")
    zoo.write(load.small(), home / "model.ckpt")
    tables = {
        "cin256-v2": zoo.checkpoint(zoo.DENOISERS["cin256-v2"]()),
        "vq-f8": zoo.layout.weights(zoo.AUTOENCODERS["vq-f8"]()),
    }
    for name, table in tables.items():
        (home / name).mkdir()
        zoo.write(table, home / name / "model.ckpt")
    return home


@pytest.fixture
def empty(published, tmp_path, monkeypatch):
    """An empty folder but for the published checkpoints, as the working directory; what the options name beside it."""
    from PIL import Image

    work, beside = tmp_path / "work", tmp_path / "beside"
    for folder in (work, beside / "few", beside / "photos"):
        folder.mkdir(parents=True)
    for entry in published.iterdir():
        (work / entry.name).symlink_to(entry)
    for name in ("lemon.png", "rocket.png", "cat.png", "dog.png"):
        (beside / "few" / name).write_bytes((tiny.CUTOUTS / name).read_bytes())
    for i in range(4):
        Image.effect_noise((40, 32), 50 + i).convert("RGB").save(beside / "photos" / f"{i}.png")
        (beside / "photos" / f"{i}.txt").write_text(("flower", "china")[i % 2])
    monkeypatch.chdir(work)
    monkeypatch.setattr("ldmfast.pipeline.text_towers.CLIP", str(letters(beside)))
    return {"few": beside / "few", "photos": beside / "photos"}


def letters(folder):
    """CLIP's tokenizer with letters alone, in place of the hub's."""
    home = folder / "tokenizer"
    home.mkdir()
    signs = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    tokens = ["!", *signs, *(f"{c}</w>" for c in signs)]
    ids = {t: i for i, t in enumerate(tokens)} | {"<|startoftext|>": 49406, "<|endoftext|>": 49407}
    (home / "vocab.json").write_text(json.dumps(ids))
    (home / "merges.txt").write_text("#version: 0.2\n")
    return home


def run_command(words, places, capsys):
    """Run one command of a page as far as this module's docstring says. Raises AssertionError."""
    program, *rest = words
    if program == "make":
        return planned(rest, places, capsys)
    if program == "pip":
        assert " ".join(words) in photos.SOURCES.values()
        return None
    if program == "accelerate":
        assert rest[0] == "launch" and "-m" in rest
        program, *rest = rest[rest.index("-m") + 1 :]
    assert program == "ldmfast", f"nobody knows how to run {program}"
    begins = [key for key in OPTIONS if " ".join(rest).startswith(key)]
    assert begins, f"OPTIONS does not say how to run ldmfast {' '.join(rest)}"
    added = OPTIONS[max(begins, key=len)].format(**places).split()
    code = cli.main([*rest, *added])
    said = capsys.readouterr()
    assert code == 0, f"{' '.join(words)}: {said.err}"
    outputs = [rest[i + 1] for i, word in enumerate(rest) if word in ("-o", "--film", "--sheet", "--html", "--output")]
    assert all(Path(output).exists() for output in outputs), words


def planned(rest, places, capsys):
    if rest == ["test"]:  # make would start it even so, and this is one of its tests
        return None
    done = subprocess.run(["make", "-n", "-C", str(ROOT), *rest], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    drawn = [line for line in done.stdout.replace("\\\n", " ").splitlines() if re.match(r"\S*ldmfast sample ", line)]
    assert len(drawn) == 1, f"make {rest[0]} is not known here"
    for line in drawn:
        run_command(["ldmfast", *shlex.split(line)[1:]], places, capsys)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", pages(), ids=lambda page: page.relative_to(ROOT).as_posix())
def test_what_a_page_says_to_run_runs(page, empty, monkeypatch, capsys):
    draw = LatentDiffusionPipeline.__call__
    small, names = {"steps": 2, "size": (64, 64)}, {"__name__": "page"}
    for language, text in blocks(page):
        if language == "python":
            with monkeypatch.context() as held:
                held.setattr(LatentDiffusionPipeline, "__call__", lambda *a, **k: draw(*a, **{**k, **small}))
                exec(compile(text, f"{page.name}, Python", "exec"), names)
        else:
            assert language == "sh", f"{page.name}: a block of {language}"
            for words in commands(text):
                run_command(words, empty, capsys)


def test_the_first_page_is_short_and_its_links_lead_somewhere():
    text = FIRST.read_text()
    assert len(text.splitlines()) <= 115
    assert len(pages()) >= 7
    for page in pages():
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert link.startswith("http") or (page.parent / link).exists(), f"{page.name}: {link}"


def test_a_command_that_nobody_can_run_is_found(empty, capsys):
    for words in (["ldmfast", "smaple"], ["ldmfst", "sample"]):
        with pytest.raises(AssertionError):
            run_command(words, empty, capsys)
    with pytest.raises(AssertionError, match="no such file"):
        run_command(shlex.split("ldmfast sample 'a cat' -o a.png --image none.png"), empty, capsys)
    assert commands("a b \\\n  c  # d\n\n# e\n") == [["a", "b", "c"]]
