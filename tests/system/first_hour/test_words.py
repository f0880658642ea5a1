"""What a model can draw, and prompts with words that it does not know."""

from __future__ import annotations

import json

import pytest

from ldmfast import shipped
from ldmfast.commands import cli
from ldmfast.commands.drawing import wording
from ldmfast.data import vocabulary
from ldmfast.data.vocabulary import Vocabulary

FEW = Vocabulary({"red apple": ["apple"], "cat": [], "dog": []}, ["blue", "yellow"], words=["background"])


def test_the_text_model_that_ships_says_what_it_draws(capsys):
    assert cli.main(["sample", "--list"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"what {shipped.TEXT} draws") and "objects: " in said and "grounds: " in said
    known = vocabulary.read(shipped.locate())
    assert len(known.objects) >= 300 and len(known.grounds) >= 8
    assert cli.main(["sample", "--list", "apple"]) == 0
    said = capsys.readouterr().out
    assert "red apple" in said and "rocket" not in said


def test_what_it_does_not_draw_is_answered_with_what_is_near(capsys):
    assert cli.main(["sample", "--list", "rokcet"]) == 1
    assert "knows no 'rokcet'; near: rocket" in capsys.readouterr().out


def test_classes_boxes_and_the_palette_are_read_from_the_folder(capsys):
    assert cli.main(["sample", "--list", "--model", shipped.SCENES]) == 0
    said = capsys.readouterr().out
    assert "--class: dog, cat" in said and "--boxes: dog, cat" in said and "red ground #de4c4a" in said


def test_a_folder_without_a_list_says_so(tmp_path, capsys):
    assert cli.main(["sample", "--list", "--model", str(tmp_path)]) == 1
    assert "has no list of what it draws" in capsys.readouterr().out


def test_strange_words_are_named_once_in_one_line(tmp_path, capsys):
    asked = [
        "sample",
        "a photorealistic cat, 4k",
        "红苹果, 4k",
        "-o",
        str(tmp_path / "a.png"),
        "--steps",
        "1",
        "--quiet",
    ]
    assert cli.main(asked) == 0
    (said,) = capsys.readouterr().err.splitlines()
    assert said == (
        "ldmfast: not among this model's words: photorealistic, 4k, 红苹果; the rest is drawn (ldmfast sample --list)"
    )


@pytest.mark.parametrize(
    ("prompt", "strange"),
    [
        ("a red apple on a blue background", []),
        ("Two cats, the dog's Apple", []),
        ("ein roter Apfel", ["ein", "roter", "Apfel"]),
        ("a dgo", ["dgo"]),
        ("", []),
        ("cat!!! -- ?", []),
    ],
)
def test_which_words_are_strange(prompt, strange):
    assert [word for word in FEW.strange(prompt) if word != "Two"] == strange


def test_a_slip_is_met_with_the_word_that_is_near():
    assert "yelow (near: yellow)" in wording.strange_words(["a cat on a yelow background"], FEW)
    assert wording.strange_words(["a zebra"], None) == ""  # nothing is known of what it knows


@pytest.mark.parametrize(
    ("typed", "taken"),
    [
        ("a red apple on a blue background", ["a red apple on a blue background"]),
        ("red apple", ["red apple"]),
        ("cat dog", ["cat", "dog"]),
        ("cat", ["cat"]),
    ],
)
def test_a_prompt_without_quotation_marks_is_one(typed, taken):
    found, said = wording.joined(typed.split(), FEW)
    assert found == taken and bool(said) == (len(taken) < len(typed.split()))
    assert wording.joined(["a cat", "dog"], FEW) == (["a cat", "dog"], "")


def test_without_a_list_an_article_tells():
    assert wording.joined(["a", "cat"], None)[0] == ["a cat"]
    assert wording.joined(["cat", "dog"], None)[0] == ["cat", "dog"]


def test_a_collections_rows_are_a_vocabulary(tmp_path):
    rows = [
        {"object": "red apple", "colour": "blue", "texts": ["a red apple on a blue background", "apple, large"]},
        {
            "objects": [{"object": "cat", "box": None}],
            "ground": "red",
            "size": "large",
            "place": "left",
            "text": "a cat",
        },
        {"text": "a kitten sleeping"},
    ]
    found = vocabulary.of_rows(rows)
    assert list(found.objects) == ["cat", "red apple"] and found.grounds == ["blue", "red"]
    assert found.sizes == ["large"] and found.places == ["left"]
    assert set(found.words) == {"background", "kitten", "sleeping"}
    vocabulary.write(tmp_path, found)
    assert vocabulary.read(tmp_path) == found
    vocabulary.write(tmp_path / "none", Vocabulary())  # nothing to say: no file, and no folder for it
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("content", ["[]", '{"object": {}}', '{"objects": 3}', "{"])
def test_a_damaged_list_is_named(tmp_path, content):
    (tmp_path / vocabulary.FILE).write_text(content)
    with pytest.raises(ValueError, match="words.json"):
        vocabulary.read(tmp_path)


def test_every_label_of_the_text_models_scores_is_a_word():
    folder = shipped.locate()
    assert json.loads((folder / vocabulary.FILE).read_text())["objects"]
    assert vocabulary.read(folder).strange("a red apple on a yellow background") == []
