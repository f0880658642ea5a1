"""Recipes: what they may say, what they fill in, and how a mistake in one is answered."""

from __future__ import annotations

import pytest

from ldmfast.commands import cli
from ldmfast.training import recipes, train_denoiser
from ldmfast.training.config import STAGES, DenoiserConfig


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_that_ships_makes_its_configurations(name):
    recipe = recipes.read(name)
    assert recipe.pop("about") and recipe
    for stage, settings in recipe.items():
        STAGES[stage](**settings)


def write(folder, text):
    path = folder / "mine.yaml"
    path.write_text(text)
    return path


def test_values_take_the_dataclasss_types(tmp_path):
    # YAML 1.1 reads 1e-3 as text and knows no tuples
    text = "denoiser: {learning_rate: 1e-3, channels: [16, 32], min_snr: 5, tensorboard: true}"
    settings = recipes.settings(write(tmp_path, text), "denoiser")
    assert settings == {"learning_rate": 1e-3, "channels": (16, 32), "min_snr": 5.0, "tensorboard": True}
    assert isinstance(settings["min_snr"], float)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("denoiser: {step: 3}", "mine.yaml, denoiser: unknown key 'step'; did you mean steps"),
        ("denoyser: {steps: 3}", "unknown section 'denoyser'; did you mean denoiser"),
        ("denoiser: {steps: many}", "denoiser.steps='many' is not a whole number"),
        ("denoiser: {steps: true}", "denoiser.steps=True is not a whole number"),
        ("denoiser: {channels: 64}", "denoiser.channels=64 is not a list of whole numbers"),
        ("denoiser: {tensorboard: 1}", "is not true or false"),
        ("denoiser: {learning_rate: fast}", "is not a number"),
        ("denoiser: [1]", "expected fields such as steps"),
        ("autoencoder: {steps: 3}", "has no section denoiser; it has autoencoder"),
        ("just words", "expected sections such as denoiser"),
        ("a: [", "is no YAML"),
    ],
)
def test_a_mistake_names_its_place(tmp_path, text, message):
    with pytest.raises(ValueError) as error:
        recipes.settings(write(tmp_path, text), "denoiser")
    assert message in str(error.value)


def test_a_file_that_is_no_text_is_named(tmp_path):
    (tmp_path / "mine.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="mine.yaml is no YAML"):
        recipes.read(tmp_path / "mine.yaml")


def test_options_override_the_recipe(tmp_path, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(train_denoiser, "train", lambda *arguments, **_: seen.append(arguments[3]) or [[1, 0.5]])
    path = write(tmp_path, "denoiser: {steps: 7, batch: 3, tensorboard: true}")
    command = [
        "train",
        "denoiser",
        "--data",
        str(tmp_path),
        "--autoencoder",
        "b",
        "--output",
        str(tmp_path),
        "--recipe",
    ]
    assert cli.main([*command, str(path), "--steps", "9", "--no-tensorboard"]) == 0
    assert seen == [DenoiserConfig(steps=9, batch=3)]
    assert cli.main([*command, str(tmp_path / "none.yaml")]) == 2
    assert "no recipe" in capsys.readouterr().err


def test_recipes_lists_and_prints_them(capsys):
    assert cli.main(["recipes"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in recipes.names()) and "emoji64" in listed
    assert cli.main(["recipes", "emoji64"]) == 0
    assert "v_prediction" in capsys.readouterr().out
