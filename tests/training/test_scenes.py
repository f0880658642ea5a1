"""Composed scenes, the detector that reads them, and what the command line says of classes, boxes and maps."""

import argparse
import json
import shutil

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from tiny import CUTOUTS

from ldmfast.commands import cli, conditions
from ldmfast.conditioning import Hybrid
from ldmfast.conditioning.classes_and_boxes import BoxEncoder, ClassEmbedder
from ldmfast.conditioning.spatial import MapEncoder
from ldmfast.data import emoji, emoji_words, scenes
from ldmfast.evaluation import scene_samples
from ldmfast.evaluation.detect import Detector, iou
from ldmfast.pipeline import LatentDiffusionPipeline
from ldmfast.training import train_denoiser, train_scenes
from ldmfast.training.config import ScenesConfig

SIZE = (64, 64)  # that is drawn


@pytest.fixture(scope="module")
def cutouts():
    return emoji.folder_cutouts(CUTOUTS)


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes") / "made"
    assert cli.main(["data", "scenes", str(folder), "--cutouts", str(CUTOUTS), "--count", "40"]) == 0
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    return folder, rows


def test_boxes_maps_and_captions_say_what_is_seen(collection):
    folder, rows = collection
    assert len(rows) == 40 and {len(row["objects"]) for row in rows} == {1, 2, 3}
    for row in rows:
        label = scenes.read_map(folder / row["map"]).numpy()
        ground = scenes.GROUNDS.index(row["ground"])
        names = {scenes.CLASSES[i] for i in np.unique(label)} - {scenes.CLASSES[ground]}
        assert names == {each["object"] for each in row["objects"]}
        picture = np.asarray(Image.open(folder / row["file_name"]))
        bare = label == ground
        away = np.abs(picture.astype(int) - emoji.COLOURS[row["ground"]]).max(axis=-1)
        assert (away[bare] == 0).mean() > 0.85  # the rest are the objects' soft rims
        for each in row["objects"]:
            assert scenes.box_of(label, scenes.CLASSES.index(each["object"])) == each["box"]
            assert all(emoji_words.with_article(part["object"]) in row["text"] for part in row["objects"])


def test_held_out_pairs_stay_out_of_training(collection):
    _, rows = collection
    several = [row for row in rows if len(row["objects"]) > 1]
    for row in several:
        assert scenes.held_out([each["object"] for each in row["objects"]]) == (row["split"] == "heldout")
    assert {row["split"] for row in several} == {"train", "heldout"}


def test_relations_follow_the_axis_that_parts_the_objects_most():
    at = lambda name, x, y: {"object": name, "box": [x, y, x + 0.2, y + 0.2]}  # noqa: E731
    text = scenes.caption([at("cat", 0.1, 0.4), at("octopus", 0.6, 0.5), at("rocket", 0.0, 0.0)], "blue")
    assert text == "a cat left of an octopus and below a rocket on a blue background"
    text = scenes.caption([at("cat", 0.6, 0.4), at("octopus", 0.1, 0.5), at("rocket", 0.7, 0.7)], "blue")
    assert text == "a cat right of an octopus and above a rocket on a blue background"


def test_an_object_that_would_be_hidden_is_drawn_again(cutouts):
    rng = np.random.default_rng(0)
    for _ in range(20):
        _, label, objects = scenes.compose_scene(cutouts, rng, ["cat", "dog", "pig"], "white", 64)
        assert len(objects) == 3 and all((label == scenes.CLASSES.index(n)).any() for n in ("cat", "dog", "pig"))
    cover = [scenes.place(cutouts["cat"], "cat", 64, 40, x, 0.5) for x in (0.4, 0.4)]
    assert scenes.hidden(cover) == [1.0, 0.0]


def test_the_detector_finds_what_a_scene_shows(collection, cutouts):
    folder, rows = collection
    detector, overlaps, agreement = Detector(cutouts), [], []
    for row in rows[:12]:
        found = detector(Image.open(folder / row["file_name"]).convert("RGB"))
        assert found.ground == row["ground"]
        boxes = {each["object"]: each["box"] for each in found.objects}
        overlaps += [iou(boxes[o["object"]], o["box"]) if o["object"] in boxes else 0.0 for o in row["objects"]]
        agreement.append((found.label == scenes.read_map(folder / row["map"]).numpy()).mean())
    assert np.mean(overlaps) > 0.7 and np.mean(agreement) > 0.9
    bare = Image.new("RGB", (64, 64), emoji.COLOURS["green"])
    assert detector(bare).objects == () and (detector(bare).label == scenes.GROUNDS.index("green")).all()


class Obeying:
    """Draws what its condition says by looking it up; a condition that it is deaf to gives a bare ground."""

    vae = argparse.Namespace(config=argparse.Namespace(sample_size=64))

    def __init__(self, folder, rows, cutouts, deaf=()):
        names = list(scenes.OBJECTS)
        self.conditioner = Hybrid(
            **{
                "class": ClassEmbedder(names, 8),
                "boxes": BoxEncoder(names, 8),
                "map": MapEncoder(len(scenes.CLASSES), 2),
            }
        )
        self.folder, self.rows, self.cutouts, self.deaf = folder, rows, cutouts, deaf

    def __call__(self, inputs, **settings):
        return [self.one(*next(iter(each.items()))) for each in inputs]

    def one(self, kind, value):
        if kind in self.deaf:
            return Image.new("RGB", (64, 64), emoji.COLOURS["blue"])
        if kind == "class":
            picture, _, _ = scenes.compose_scene(self.cutouts, np.random.default_rng(0), [value], "green", 64)
            return Image.fromarray(picture)
        read = {"boxes": lambda row: row["objects"], "map": lambda row: scenes.read_map(self.folder / row["map"])}
        row = next(row for row in self.rows if np.array_equal(read[kind](row), value))
        return Image.open(self.folder / row["file_name"])


def test_scores_tell_a_model_that_obeys_from_one_that_does_not(collection, cutouts):
    folder, rows = collection
    report = scene_samples.evaluate(Obeying(folder, rows, cutouts), folder, cutouts, samples=4)
    assert report["class"]["retrieved"] == 1
    for split in ("train", "heldout"):
        assert report[split]["boxes"] == report[split]["scenes themselves"]["boxes"]
        assert report[split]["boxes"]["iou"] > 0.6 and report[split]["map"]["agreement"] > 0.9
    deaf = Obeying(folder, rows, cutouts, deaf=("class", "boxes", "map"))
    report = scene_samples.evaluate(deaf, folder, cutouts, samples=2)
    assert report["class"]["retrieved"] == 0 == report["train"]["boxes"]["iou"]
    assert report["train"]["map"]["objects_agreement"] == 0


def test_iou():
    assert iou([0, 0, 1, 1], [0, 0, 1, 1]) == 1 and iou([0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1]) == 0
    assert iou([0, 0, 0.5, 1], [0.25, 0, 0.75, 1]) == pytest.approx(1 / 3)


def test_a_scene_offers_its_boxes_and_its_map(collection):
    folder, rows = collection
    one = next(row for row in rows if len(row["objects"]) == 1)
    several = next(row for row in rows if len(row["objects"]) > 1)
    assert [next(iter(each)) for each in train_scenes.inputs(one, folder)] == ["boxes", "map"]
    assert [next(iter(each)) for each in train_scenes.inputs(several, folder)] == ["boxes", "map"]


def _asked(classes=None, boxes=None, maps=None):
    return argparse.Namespace(classes=classes, boxes=boxes, maps=maps)


def test_the_command_line_becomes_inputs(tmp_path):
    hybrid = Hybrid(
        **{"class": ClassEmbedder(["cat", "dog"], 8), "boxes": BoxEncoder(["cat"], 8), "map": MapEncoder(2, 2)}
    )
    layout = [{"object": "cat", "box": [0, 0, 0.5, 0.5]}]
    (tmp_path / "a.json").write_text(json.dumps({"objects": layout}))
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    assert conditions.inputs(_asked(), hybrid, SIZE) is None
    assert conditions.inputs(_asked(["cat", "1"]), hybrid, SIZE) == [{"class": "cat"}, {"class": 1}]
    assert conditions.inputs(_asked(["cat"]), hybrid.members["class"], SIZE) == ["cat"]
    both = conditions.inputs(_asked(boxes=[tmp_path / "a.json"], maps=[tmp_path / "a.png"]), hybrid, (8, 8))
    assert both[0]["boxes"] == layout and both[0]["map"].size == (8, 8)


@pytest.mark.parametrize(
    ("asked", "message"), [(_asked(maps=["x.png"]), "takes no --map"), (_asked(boxes=["x.json"]), "takes no --boxes")]
)
def test_an_option_that_the_model_does_not_take_is_refused(asked, message):
    with pytest.raises(ValueError, match=message):
        conditions.inputs(asked, ClassEmbedder(2, 8), SIZE)


def test_a_file_that_holds_no_boxes_is_refused(tmp_path):
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ValueError, match="is no JSON"):
        conditions.inputs(_asked(boxes=[tmp_path / "a.json"]), BoxEncoder(2, 8), SIZE)
    (tmp_path / "a.json").write_text("3")
    with pytest.raises(ValueError, match="expected a list"):
        conditions.inputs(_asked(boxes=[tmp_path / "a.json"]), BoxEncoder(2, 8), SIZE)


def test_what_is_no_collection_of_scenes_is_not_scored(tmp_path):
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a cat"}')
    with pytest.raises(ValueError, match="a.png has no objects and map; a model of scenes is scored on"):
        scene_samples.evaluate(None, tmp_path, {}, samples=1)


def test_what_is_no_collection_of_scenes_is_not_trained_on(tmp_path, capsys):
    made = [f'{{"file_name": "{path.name}", "text": "a cat"}}\n' for path in sorted(CUTOUTS.glob("*.png"))[:2]]
    for path in sorted(CUTOUTS.glob("*.png"))[:2]:
        shutil.copy(path, tmp_path)
    (tmp_path / "metadata.jsonl").write_text("".join(made))
    where = ["--data", str(tmp_path), "--output", str(tmp_path / "run")]
    assert cli.main(["train", "scenes", *where, "--autoencoder", "scenes64", "--device", "cpu"]) == 2
    assert "has no objects; `ldmfast data scenes` makes scenes" in capsys.readouterr().err


def test_the_network_of_scenes_is_conditioned_on_boxes_and_maps(collection):
    folder, rows = collection
    settings = ScenesConfig(channels=(16, 32), attention=(0, 1), groups=8, head_width=16, width=16, map_channels=2)
    encoder = train_scenes.conditioner(settings, 16, 4, rows)
    unet = train_denoiser.network(settings, (4, 16, 16), encoder).eval()
    assert unet.config.in_channels == 4 + (10 + 2 + 10) + 2
    one = next(row for row in rows if len(row["objects"]) == 1)
    x = torch.randn(1, 4, 16, 16)
    with torch.no_grad():
        nothing = encoder.empty(1).predict(unet, x, 500)
        for value in train_scenes.inputs(one, folder):
            assert not torch.equal(encoder([value]).predict(unet, x, 500), nothing), value


def test_a_class_becomes_one_of_its_boxes(collection):
    _, rows = collection
    boxes = train_scenes.class_boxes(rows)
    shown = {o["object"] for row in rows if row["split"] == "train" for o in row["objects"]}
    lone = {row["objects"][0]["object"] for row in rows if row["split"] == "train" and len(row["objects"]) == 1}
    assert set(boxes) == shown and lone
    for name in lone:
        assert all([{"object": name, "box": box}] in [row["objects"] for row in rows] for box in boxes[name])
    settings = ScenesConfig(channels=(16,), attention=(1,), width=16, map_channels=2)
    encoder = train_scenes.conditioner(settings, 16, 4, rows)
    name, label = next(iter(lone)), torch.zeros(64, 64, dtype=torch.uint8)
    first, again, other = (encoder.complete([{"class": name, "map": label}], [seed])[0] for seed in (3, 3, 4))
    assert first == again and set(first) == {"boxes", "map"} and first["boxes"][0]["object"] == name
    assert {tuple(encoder.complete([{"class": name}], [s])[0]["boxes"][0]["box"]) for s in range(200)} == {
        tuple(box) for box in boxes[name]
    }
    assert encoder.complete([{"map": label}], [0]) == [{"map": label}] and other
    with pytest.raises(ValueError, match="class is drawn as boxes, and this input has both"):
        encoder.complete([{"class": name, "boxes": []}], [0])
    with pytest.raises(ValueError, match="did you mean"):
        encoder.complete([{"class": name + "s"}], [0])
    with pytest.raises(ValueError, match="call complete"):
        encoder([{"class": name}])


@pytest.mark.parametrize("option", ["--condition", "--text-encoder", "--class-key", "--text-layers"])
def test_options_that_scenes_would_ignore_are_refused(option, capsys):
    """The conditions of a scene are not chosen: they are boxes and maps."""
    with pytest.raises(SystemExit):
        cli.main(["train", "scenes", "--data", "d", "--autoencoder", "a", "--output", "o", option, "class"])
    assert f"unrecognized arguments: {option} class" in capsys.readouterr().err


def test_from_scenes_to_samples_on_the_command_line(collection, tmp_path, capsys):
    folder, rows = collection
    tiny.vae(sample_size=64, block_out_channels=(8, 8, 8), norm_num_groups=4).save_pretrained(tmp_path / "vae")
    network = ["--channels", "8,16", "--attention", "0,1", "--groups", "4", "--head-width", "8", "--width", "8"]
    run = ["--steps", "2", "--batch", "4", "--precision", "fp32", "--quiet", "--output", str(tmp_path)]
    where = ["--data", str(folder), "--autoencoder", str(tmp_path)]
    assert cli.main(["train", "scenes", "--recipe", "scenes64", *where, *run, *network]) == 0

    layout = tmp_path / "layout.json"
    layout.write_text(json.dumps(rows[0]["objects"]))
    drawn = tmp_path / "drawn.png"
    asked = {"--class": ["cat", "dog"], "--boxes": [str(layout)], "--map": [str(folder / rows[0]["map"])]}
    model = ["--model", str(tmp_path / "pipeline"), "--steps", "2", "--quiet"]
    for option, values in asked.items():
        assert cli.main(["sample", option, *values, "-o", str(drawn), "--scale", "1", *model]) == 0
        assert Image.open(drawn).size == (64, 68 * len(values) - 4)  # one below the other, 4 pixels apart
    assert cli.main(["sample", "-o", str(drawn), *model]) == 2
    assert "--class or --boxes or --map" in capsys.readouterr().err
    scores = tmp_path / "scores.json"
    ask = ["evaluate", "--data", str(folder), "--cutouts", str(CUTOUTS), "--samples", "2", "--output", str(scores)]
    assert cli.main([*ask, "--sheet", str(drawn), *model]) == 0
    # two of the classes, and of boxes and maps of either split, 8 a row
    assert Image.open(drawn).size == (8 * 68 - 4, 2 * 68 - 4)
    report = json.loads(scores.read_text())
    assert 0 <= report["class"]["retrieved"] <= 1 and report["heldout"]["map"]["ground_alone"] > 0.5


def test_the_model_that_ships_draws_the_class_the_boxes_and_the_map(cutouts, tmp_path):
    pipe, detector = LatentDiffusionPipeline.from_pretrained("scenes64"), Detector(cutouts)
    names = ["panda", "soccer ball", "car", "dog"]
    found = [detector(p) for p in pipe([{"class": name} for name in names], steps=15)]
    assert sum(each.objects[0]["object"] == name for each, name in zip(found, names, strict=True)) >= 3

    rng = np.random.default_rng(1)
    _, label, objects = scenes.compose_scene(cutouts, rng, ["soccer ball", "panda"], "yellow", 64)
    boxes, mapped = (detector(p) for p in pipe([{"boxes": objects}, {"map": torch.from_numpy(label)}], steps=15))
    assert scene_samples.boxes_score([boxes], [objects])["iou"] > 0.5
    assert scene_samples.map_score([mapped], [label])["agreement"] > 0.8
