"""Pictures of one or two objects: the collection, and the scores of a model that is trained on it."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from tiny import CUTOUTS

from ldmfast.commands import cli
from ldmfast.conditioning.text import TextEncoder
from ldmfast.data import emoji, emoji_words, objects, vocabulary
from ldmfast.diffusion.schedule import make_scheduler
from ldmfast.evaluation import object_samples
from ldmfast.evaluation.detect import Detector, Found
from ldmfast.pipeline import LatentDiffusionPipeline
from ldmfast.training import train_denoiser
from ldmfast.training.config import DenoiserConfig
from ldmfast.training.first_weights import of_a_model


@pytest.fixture(scope="module")
def cutouts():
    return emoji.folder_cutouts(CUTOUTS)


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    folder = tmp_path_factory.mktemp("objects") / "made"
    assert cli.main(["data", "objects", str(folder), "--cutouts", str(CUTOUTS), "--count", "120", "--size", "64"]) == 0
    return folder, [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def test_the_catalogue_of_320_holds_the_64_and_names_of_the_600():
    few, some, every = (set(map(str, emoji_words.catalogue(which).values())) for which in emoji_words.CATALOGUES)
    assert (len(few), len(some)) == (64, 320) and few < some < every


def test_boxes_are_where_the_objects_are(collection):
    folder, rows = collection
    for row in rows:
        picture = np.asarray(Image.open(folder / row["file_name"]), dtype=int)
        off = np.abs(picture - objects.GROUNDS[row["ground"]]).sum(axis=2) > 0
        outside = off.copy()
        for each in row["objects"]:
            x0, y0, x1, y1 = (round(64 * v) for v in each["box"])
            assert off[y0:y1, x0:x1].any(), row
            outside[max(0, y0 - 1) : y1 + 1, max(0, x0 - 1) : x1 + 1] = False  # a soft rim is outside the box
        assert outside.mean() < 0.01, row
    assert {len(row["objects"]) for row in rows} == {1, 2}


def test_an_object_stands_in_the_middle_of_a_square_of_its_size(collection):
    """Its box is in the middle of a square of 4, 6 or 8 eighths at a corner of those; two squares do not overlap."""
    seen = set()
    for row in collection[1]:
        squares = []
        for each in row["objects"]:
            word = each["size"] if len(row["objects"]) == 1 else "small"
            side, corners = objects.SQUARES[word]
            middle = [(low + high) / 2 for low, high in zip(each["box"][:2], each["box"][2:], strict=True)]
            corner = tuple(round(8 * m - side / 2) for m in middle)
            assert set(corner) <= set(corners) and np.allclose(middle, np.add(corner, side / 2) / 8, atol=1.6 / 64), row
            longer = max(np.subtract(each["box"][2:], each["box"][:2]))
            assert longer == pytest.approx(objects.side_of(word, 64) / 64, abs=2.1 / 64), row
            seen.add((word, corner))
            squares.append(corner)
        assert len(squares) == 1 or max(abs(np.subtract(*squares))) >= 4, row
    assert {word for word, _ in seen} == set(objects.SQUARES) and len(seen) > 12


def test_a_model_knows_the_words_of_its_collection(collection):
    words = vocabulary.of_rows(collection[1])
    assert set(words.sizes) == {"small", "large"} and set(words.places) <= {
        "on the left",
        "on the right",
        "at the top",
        "at the bottom",
        "in the middle",
    }
    assert len(words.places) > 2 and any(words.objects.values())
    aliases = {names[0]: names[1:] for names in emoji_words.catalogue("all").values()}
    assert all(list(others) == list(aliases[name]) for name, others in words.objects.items())


def test_what_is_held_out_is_never_trained_on(cutouts, collection):
    names = objects.names_of(cutouts)
    for row in collection[1]:
        indices = [names.index(each["object"]) for each in row["objects"]]
        pair = len(indices) == 2 and objects.held_out_pair(indices)
        ground = row["ground"] in map(objects.held_out_ground, indices)
        unseen = pair if len(indices) == 2 else ground
        assert unseen if row["split"] == "heldout" else not (pair or ground), row


def test_every_caption_names_what_is_there_and_none_comes_twice(collection):
    """But for the ground, which one in ten of the others than the plainest leaves out."""
    aliases = {names[0]: names for names in emoji_words.catalogue("all").values()}
    said = [[row["ground"] in text for text in row["texts"]] for row in collection[1]]
    assert all(first for first, *_ in said) and 0.8 < np.mean([rest for _, *rest in said]) < 1
    for row in collection[1]:
        assert row["text"] == row["texts"][0] and len(set(row["texts"])) == len(row["texts"]) == objects.CAPTIONS
        for text in row["texts"]:
            for each in row["objects"]:
                said = [*aliases[each["object"]], each["object"].partition(" ")[2] or each["object"]]
                assert any(name in text for name in said), (text, each)


beside = lambda dx, dy: abs(dx) >= abs(dy)  # noqa: E731
SEEN = {  # words -> whether they are true of an object whose centre is (dx, dy) from the other's, y downwards
    "to the left of": lambda dx, dy: dx < 0 and beside(dx, dy),
    "left of": lambda dx, dy: dx < 0 and beside(dx, dy),
    "to the right of": lambda dx, dy: dx >= 0 and beside(dx, dy),
    "right of": lambda dx, dy: dx >= 0 and beside(dx, dy),
    "beside": beside,
    "next to": beside,
    "above": lambda dx, dy: dy < 0 and not beside(dx, dy),
    "over": lambda dx, dy: dy < 0 and not beside(dx, dy),
    "below": lambda dx, dy: dy > 0 and not beside(dx, dy),
    "under": lambda dx, dy: dy > 0 and not beside(dx, dy),
}


def related(text):
    """(what stands before the words of a relation, these, what stands behind), or None."""
    found = re.search(rf"(.*) ({'|'.join(SEEN)}) (.*)", text)
    if found and found[1].endswith(" to the"):  # the longest words that fit
        return found[1].removesuffix(" to the"), f"to the {found[2]}", found[3]
    return found and found.groups()


def assert_relation_holds(text, pair):
    """Of one of the ways to tell which object is which: "apple" may be the red one or the green one."""
    parts = related(text)
    if parts is None:
        return ""
    aliases = {names[0]: names for names in emoji_words.catalogue("all").values()}
    centre = lambda each: [(low + high) / 2 for low, high in zip(each["box"][:2], each["box"][2:], strict=True)]  # noqa: E731
    named = lambda each, part: any(name in part for name in aliases[each["object"]])  # noqa: E731
    ways = [(a, b) for a, b in (pair, pair[::-1]) if named(a, parts[0]) and named(b, parts[2])]
    assert any(SEEN[parts[1]](*np.subtract(centre(a), centre(b))) for a, b in ways), (text, pair)
    return parts[1]


@pytest.mark.parametrize("dx, dy", [(-0.4, 0.1), (0.4, 0.1), (0.1, -0.4), (0.1, 0.4), (-0.3, -0.29), (0.29, 0.3)])
def test_every_word_of_a_relation_is_said_where_it_is_true_and_only_there(dx, dy):
    at = lambda name, x, y: {"object": name, "size": "", "box": [x, y, x + 0.2, y + 0.2]}  # noqa: E731
    pair = [at("cat", 0.4 + dx, 0.4 + dy), at("rocket", 0.4, 0.4)]
    aliases, said = {"cat": ["cat"], "rocket": ["rocket"]}, set()
    for seed in range(200):
        for text in objects.captions(np.random.default_rng(seed), pair, "red", aliases):
            said.add(assert_relation_holds(text, pair))
    either = {word for word, true in SEEN.items() if true(dx, dy) or true(-dx, -dy)}
    assert said - {""} == either


def test_the_words_of_relations_are_all_known_here():
    assert {word for words in objects.RELATIONS.values() for word in words} == SEEN.keys()


def test_a_caption_says_the_place_size_and_relation_that_is_seen(collection):
    for row in collection[1]:
        for text in row["texts"]:
            if len(row["objects"]) == 1:
                place = objects.place_of(row["objects"][0]["box"])
                for other in ("on the left", "on the right", "at the top", "at the bottom", "in the middle"):
                    assert other not in text or other == place, (text, row)
                for word in ("small", "large"):
                    assert f"{word} " not in text or row["objects"][0]["size"] == word
            else:
                assert_relation_holds(text, row["objects"])


@pytest.mark.parametrize(
    "box, place",
    [
        ([0.25, 0.25, 0.75, 0.75], "in the middle"),
        ([0.0, 0.2, 0.5, 0.7], "on the left"),
        ([0.5, 0.3, 1.0, 0.7], "on the right"),
        ([0.2, 0.0, 0.8, 0.5], "at the top"),
        ([0.3, 0.6, 0.7, 1.0], "at the bottom"),
        ([0.33, 0.25, 0.83, 0.75], ""),
    ],
)
def test_the_word_for_a_place(box, place):
    assert objects.place_of(box) == place


def test_what_cannot_be_built_is_said(cutouts, tmp_path):
    with pytest.raises(ValueError, match="size=100 is no multiple of 8"):
        objects.build(cutouts, tmp_path / "made", size=100)
    with pytest.raises(ValueError, match="two cut-outs or more are needed, got 1"):
        objects.build({"cat": cutouts["cat"]}, tmp_path / "made")


def test_the_scores_count_what_was_asked_for():
    row = lambda *names: {"objects": [{"object": n} for n in names], "ground": "red"}  # noqa: E731
    seen = lambda *names: Found("red", tuple({"object": n} for n in names), np.zeros((1, 1)))  # noqa: E731
    assert object_samples.object_score([seen("cat"), seen(), seen("dog")], [row("cat")] * 3) == {
        "object": round(1 / 3, 4),
        "ground": 1.0,
    }
    found, rows = [seen("dog", "cat"), seen("cat"), seen("pig")], [row("cat", "dog")] * 3
    assert object_samples.pair_score(found, rows) == {"both": round(1 / 3, 4), "one": round(2 / 3, 4), "ground": 1.0}


def test_the_ground_is_read_off_the_frame(cutouts, collection):
    folder, rows = collection
    read = Detector(cutouts, 64, names=objects.names_of(cutouts), grounds=objects.GROUNDS, sides=[32])
    seen = [read(Image.open(folder / row["file_name"]), most=0).ground for row in rows]
    assert seen == [row["ground"] for row in rows]
    covered = np.full((64, 64, 3), objects.GROUNDS["green"], dtype=np.uint8)
    covered[6:58, 6:58] = objects.GROUNDS["white"]  # most of the picture
    assert read(covered, most=0).ground == "green"


def test_gradient_energy_and_spread():
    steps = torch.tensor([0.0, 1.0, 0.0, 1.0]).expand(1, 3, 4, 4)
    assert object_samples.gradient_energy(steps) == 1.0 and object_samples.gradient_energy(0 * steps) == 0.0
    pictures = torch.arange(3.0).view(3, 1, 1, 1).expand(3, 3, 2, 2)
    absolute = lambda x, y: (x - y).abs().mean(dim=(1, 2, 3))  # noqa: E731
    assert object_samples.spread(pictures, absolute) == pytest.approx(4 / 3)


def test_a_denoiser_begins_with_another_ones_weights(tmp_path):
    settings = dict(channels=(16, 32), attention=(0, 1), groups=8, head_width=16)
    source = train_denoiser.build(DenoiserConfig(**settings, seed=1), 4, 16, 24)
    source.save_pretrained(tmp_path / "unet")
    wider = train_denoiser.build(DenoiserConfig(**settings), 4, 16, 20)  # reads captions of another width
    fresh = {name: value.clone() for name, value in wider.state_dict().items()}
    kept = of_a_model.begin_with(wider, tmp_path)
    assert kept and all(name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")) for name in kept)
    for name, value in wider.state_dict().items():
        assert torch.equal(value, fresh[name] if name in kept else source.state_dict()[name]), name
    other = train_denoiser.build(DenoiserConfig(**settings | {"channels": (8, 24), "head_width": 8}), 3, 16, 20)
    with pytest.raises(ValueError, match=r"first_weights=.*: none of its \d+ weights has a name and shape"):
        of_a_model.begin_with(other, tmp_path)


def test_a_model_is_scored_from_the_command_line(collection, tmp_path, monkeypatch, capsys):
    """An untrained one, with a stock autoencoder: each kind is drawn and counted, and the sheet shows the samples."""
    monkeypatch.setattr(object_samples, "REQUESTS", 2)
    monkeypatch.setattr(object_samples, "PROMPTS", 1)
    monkeypatch.setattr(object_samples, "RECONSTRUCTED", 8)
    conditioner = TextEncoder.from_pretrained("minilm")
    unet = train_denoiser.build(DenoiserConfig(channels=(16, 32), attention=(0, 1), groups=8), 4, 32, 384)
    pipe = LatentDiffusionPipeline(unet, tiny.vae(sample_size=64), make_scheduler(0.0015, 0.0195), conditioner)
    pipe.save_pretrained(tmp_path / "model")
    options = ["--samples", "3", "--steps", "1", "--quiet", "--sheet", str(tmp_path / "sheet.png")]
    data = ["--data", str(collection[0]), "--cutouts", str(CUTOUTS)]
    assert cli.main(["evaluate", "--model", str(tmp_path / "model"), *data, *options]) == 0
    report = json.loads(capsys.readouterr().out)
    for split in ("train", "heldout"):
        one, two = report[split]["one object"], report[split]["two objects"]
        assert one["object"] <= 1 and two["both"] <= two["one"]
        assert one["pictures themselves"] == {"object": 1.0, "ground": 1.0}
    assert (
        set(object_samples.PHRASINGS) < set(report["phrasings"]) and report["variety"]["share of the collection's"] > 0
    )
    assert {"psnr", "ssim", "crispness", "efficientnet-lite0"} == set(report["autoencoder"])
    width, height = Image.open(tmp_path / "sheet.png").size
    assert width > 8 * 64 and height > 2 * 64  # 3 of each kind of each split, 8 a row


def test_a_collection_without_objects_is_refused(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a cat")
    pipe = SimpleNamespace(vae=SimpleNamespace(config=SimpleNamespace(sample_size=64)))
    with pytest.raises(ValueError, match="a.png has no objects and ground; this is scored on `ldmfast data objects`"):
        object_samples.evaluate(pipe, tmp_path, {})
