"""`sample` and `evaluate` by several processes draw and score what one does; two real processes over gloo."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import socket
from pathlib import Path

import pytest
from lora_pipelines import stable_diffusion
from PIL import Image
from tiny import CUTOUTS

from ldmfast.commands import cli, several_processes
from ldmfast.data import emoji

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # numpy's, about diffusers
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class OutOfLuck:
    def __call__(self, inputs, **options):
        raise ValueError("out of luck")


def process(index, port, home, commands, spoiled):
    """One of two, which runs each command and keeps what it said and its exit codes.

    spoiled   the second one has a pipeline that raises
    """
    import torch

    torch.set_num_threads(1)
    places = (str(index), str(index), "2", "2", "127.0.0.1", str(port))
    os.environ.update(dict(zip(LAUNCHED, places, strict=True)))
    codes = []
    if spoiled and index == 1:
        several_processes._Processes._load = lambda self, *_: setattr(self, "pipe", OutOfLuck()) or []
    with (
        Path(home, f"{index}.txt").open("w") as said,
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(said),
    ):
        for command in commands:
            codes.append(cli.main(command))
            from accelerate.state import PartialState

            PartialState._reset_state()
    Path(home, f"{index}.json").write_text(json.dumps(codes))


@pytest.fixture(scope="module")
def two():
    """Runs commands in two processes; (their exit codes, what they said)."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ldmfast.training.train_denoiser"])  # an installed name: it lacks pytest's path

    def run(home, *commands, spoiled=False):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        both = [context.Process(target=process, args=(i, port, home, commands, spoiled)) for i in range(2)]
        for each in both:
            each.start()
        for each in both:
            each.join(120)
            if each.is_alive():
                each.kill()
        assert [each.exitcode for each in both] == [0, 0]
        return [json.loads(Path(home, f"{i}.json").read_text()) for i in range(2)], [
            Path(home, f"{i}.txt").read_text() for i in range(2)
        ]

    return run


def sample(model, out, *more):
    options = ["--steps", "2", "--seed", "5", "--scale", "1", "--size", "32x32", "--exact", "--device", "cpu"]
    return ["sample", *more, "--model", str(model), "-o", str(out), *options]


def evaluation(out, *more):
    few = ["--samples", "3", "--steps", "1", "--device", "cpu", "--exact", "--quiet"]
    return ["evaluate", "--output", str(out), "--sheet", f"{out}.png", *few, *more]


def test_two_processes_draw_what_one_draws(two, tmp_path):
    """Pictures of several inputs and sizes of shares, one picture alone, a mistake on the way, then another command."""
    stable_diffusion().save_pretrained(tmp_path / "model")
    commands = {
        "three.png": ["a", "b", "a (cat:1.2)", "--negative", "dog", "--clip-skip", "1"],
        "one.png": ["a", "--preview-every", "1"],
        "batches.png": ["a", "b", "-n", "2", "--batch", "1", "--sampler", "euler-a"],
    }
    wrong = sample(tmp_path / "model", tmp_path / "no.png", "a", "--clip-skip", "9")
    codes, said = two(tmp_path, *(sample(tmp_path / "model", tmp_path / n, *c) for n, c in commands.items()), wrong)
    assert codes == [[0, 0, 0, 2], [0, 0, 0, 0]]
    assert "clip_skip=9 must be" in said[0] and "step" in said[0] and said[1] == ""
    (tmp_path / "alone").mkdir()
    for name, command in commands.items():
        assert cli.main([*sample(tmp_path / "model", tmp_path / "alone" / name, *command), "--quiet"]) == 0
        assert Image.open(tmp_path / name).tobytes() == Image.open(tmp_path / "alone" / name).tobytes()
    assert sorted(p.name for p in tmp_path.glob("*.png")) == sorted(commands)


def test_two_processes_score_what_one_scores(two, tmp_path):
    collection = tmp_path / "pictures"
    few = {name: emoji.folder_cutouts(CUTOUTS)[name] for name in ("lemon", "cat")}
    emoji.build(few, collection, size=64, count=1)
    rows = (collection / "metadata.jsonl").read_text().splitlines()
    kept = [[row for row in rows if json.loads(row)["split"] == split][:4] for split in ("train", "heldout")]
    assert all(kept)
    (collection / "metadata.jsonl").write_text("\n".join([*kept[0], *kept[1], ""]))
    assert cli.main(evaluation(tmp_path / "one.json", "--data", str(collection))) == 0
    codes, said = two(tmp_path, evaluation(tmp_path / "two.json", "--data", str(collection)))
    assert codes == [[0], [0]] and said[1] == ""
    assert json.loads((tmp_path / "one.json").read_text()) == json.loads((tmp_path / "two.json").read_text())
    assert Image.open(tmp_path / "one.json.png").tobytes() == Image.open(tmp_path / "two.json.png").tobytes()


def test_what_goes_wrong_in_another_process_is_said_by_the_main_one(two, tmp_path):
    """The second one's pipeline raises."""
    stable_diffusion().save_pretrained(tmp_path / "model")
    words = sample(tmp_path / "model", tmp_path / "a.png", "a cat", "a dog", "--quiet")
    codes, said = two(tmp_path, words, spoiled=True)
    assert codes == [[2], [0]] and said == ["ldmfast: process 1: ValueError: out of luck\n", ""]
    assert not (tmp_path / "a.png").exists()


def test_a_device_for_all_and_a_launch_that_started_one_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main([*sample("emoji320", tmp_path / "a.png", "a cat"), "--device", "cuda:1"]) == 2
    assert "--device cuda:1: each of several processes has a device of its own" in capsys.readouterr().err
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert cli.main(sample("emoji320", tmp_path / "a.png", "a cat")) == 2
    assert "started one" in capsys.readouterr().err
