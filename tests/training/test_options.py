"""What an option's metadata decides: its bounds, whether a continued run may change it, what it was called before."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest
import torch

from ldmfast.training import options, recipes
from ldmfast.training.config import (
    STAGES,
    AutoencoderConfig,
    DecoderConfig,
    DenoiserConfig,
    LoraConfig,
    RunConfig,
    ScenesConfig,
)
from ldmfast.training.options import again, option
from ldmfast.training.run import Run

CPU = dict(precision="fp32", device="cpu")


@dataclass(frozen=True)
class Own(RunConfig):
    """A stage whose options no other code has heard of."""

    least: int = option(3, "at least 2", least=2)
    above: float = option(0.5, "above 0", above=0)
    most: float = option(0.5, "at most 1", most=1)
    below: float = option(0.5, "below 1", below=1)
    each: tuple = option((8, 16), "each at least 1", least=1)
    choice: str = option("a", "a or b", ("a", "b"))
    fixed: int = option(1, "the same in a continued run")
    loose: int = option(1, "free to differ", free=True)
    if_a: int = option(1, "free to differ for a", free=lambda config: config.choice == "a")
    renamed: int = option(1, "had another name", formerly="its_old_name")


@dataclass(frozen=True)
class Derived(Own):
    least: int = again(Own, "least", 7)
    loose: int = again(Own, "loose", 2, "another text")


@pytest.mark.parametrize("config", [Own, Derived])
@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("least", 1, "least=1 must be at least 2"),
        ("above", 0, "above=0 must be above 0"),
        ("most", 1.5, "most=1.5 must be at most 1"),
        ("below", 1, "below=1 must be below 1"),
        ("least", float("nan"), "least=nan must be at least 2"),
        ("each", (8, 0), "each=(8, 0) must be at least 1"),
        ("above", float("inf"), "above=inf must be a finite number"),
        ("weight_decay", -1.0, "weight_decay=-1.0 must be at least 0"),
        ("seed", 2**70, f"seed={2**70} must be at most {2**63 - 1}"),
        ("choice", "c", "choice='c' is none of a, b"),
    ],
)
def test_a_value_out_of_its_bounds_is_refused(config, name, value, sentence):
    with pytest.raises(ValueError) as error:
        config(**{name: value})
    assert str(error.value) == sentence


def test_the_bound_itself_is_within_or_without():
    assert Own(least=2, most=1, above=1e-9, below=1 - 1e-9)


@pytest.mark.parametrize(
    ("config", "name", "value"),
    [
        (AutoencoderConfig, "channels", (0, 8)),
        (AutoencoderConfig, "channels", (-8, 8)),
        (AutoencoderConfig, "groups", 0),
        (AutoencoderConfig, "latent_channels", 0),
        (AutoencoderConfig, "layers", -1),
        (AutoencoderConfig, "kl_weight", -1.0),
        (DecoderConfig, "ssim_weight", -1.0),
        (DenoiserConfig, "head_width", 0),
        (DenoiserConfig, "attention", (0, 1, 2)),
        (ScenesConfig, "beta_end", 1.5),
    ],
)
def test_what_no_network_or_loss_can_be_made_of_is_refused(config, name, value):
    with pytest.raises(ValueError, match=f"^{name}=.* must be at (least|most)|^{name}=.* must be below"):
        config(**{name: value})


def test_a_derived_stage_changes_the_default_alone():
    (before,), (after,) = ([f for f in dataclasses.fields(c) if f.name == "loose"] for c in (Own, Derived))
    assert (after.default, after.metadata["help"]) == (2, "another text")
    assert {**after.metadata, "help": ""} == {**before.metadata, "help": ""}


@pytest.mark.parametrize(
    ("stage", "wrong"),
    [
        (AutoencoderConfig, {"warmup": -1}),
        (AutoencoderConfig, {"revive_every": -1}),
        (AutoencoderConfig, {"codebook": 0}),
        (AutoencoderConfig, {"crop": -4}),
        (AutoencoderConfig, {"size": 0}),
        (DecoderConfig, {"discriminator_lead": -1}),
        (DecoderConfig, {"discriminator_layers": 0}),
        (DecoderConfig, {"perceptual_weight": -1.0}),
        (DenoiserConfig, {"min_snr": -1.0}),
        (DenoiserConfig, {"min_snr": float("nan")}),
        (DenoiserConfig, {"plain_captions": 1.5}),
        (DenoiserConfig, {"guidance_dropout": -0.1}),
        (DenoiserConfig, {"ema": 1.0}),
        (DenoiserConfig, {"width": 0}),
        (DenoiserConfig, {"text_layers": 0}),
        (ScenesConfig, {"only_boxes": 2.0}),
        (ScenesConfig, {"map_channels": 0}),
        (LoraConfig, {"rank": 0}),
        (LoraConfig, {"sample_every": -1}),
        *((stage, {name: 0}) for stage in STAGES.values() for name in ("steps", "batch", "accumulate", "clip")),
        *((stage, {name: 0}) for stage in STAGES.values() for name in ("learning_rate", "save_every", "log_every")),
    ],
)
def test_the_stages_options_have_their_bounds(stage, wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"^{name}={value} must be "):
        stage(**wrong)


@pytest.mark.parametrize("wrong", [{"precision": "fp8"}, {"attention": (1,)}, {"schedule": "zigzag"}, {"layers": 0}])
def test_a_wrong_configuration_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        DenoiserConfig(**wrong)


# --- continuing a run ------------------------------------------------------------------------------------------------


def state_of(config):
    return Run(torch.nn.Linear(2, 2), config).state()


def test_what_may_differ_in_a_continued_run_stands_beside_the_option():
    saved = state_of(Own(**CPU))
    for changes in ({}, {"loose": 5}, {"if_a": 5}, {"batch": 8, "accumulate": 2}, {"export": "fp32", "save_every": 1}):
        Run(torch.nn.Linear(2, 2), Own(**CPU, **changes)).restore(saved)
    for changes, sentence in (
        ({"fixed": 5}, "fixed was 1, is 5"),
        ({"choice": "b", "if_a": 5}, "choice was 'a', is 'b'; if_a was 1, is 5"),
        ({"batch": 8}, r"batch \* accumulate \* processes was 16, is 8"),
        ({"steps": 2000}, "steps was 1000, is 2000"),  # a cosine ends at the last step
    ):
        with pytest.raises(ValueError, match=rf"another configuration \({sentence}\); see --restart"):
            Run(torch.nn.Linear(2, 2), Own(**CPU, **changes)).restore(saved)
    constant = Own(**CPU, schedule="constant")
    Run(torch.nn.Linear(2, 2), dataclasses.replace(constant, steps=2000)).restore(state_of(constant))


def test_an_option_under_its_earlier_name_is_compared_all_the_same():
    saved = state_of(Own(**CPU, renamed=4))
    saved["config"]["its_old_name"] = saved["config"].pop("renamed")
    Run(torch.nn.Linear(2, 2), Own(**CPU, renamed=4)).restore(saved)
    with pytest.raises(ValueError, match="renamed was 4, is 1"):
        Run(torch.nn.Linear(2, 2), Own(**CPU)).restore(saved)


def test_scenes_of_earlier_recipes_and_checkpoints_keep_their_share_of_boxes(tmp_path):
    path = tmp_path / "earlier.yaml"
    path.write_text("scenes: {steps: 3, plain_captions: 0.25}")
    config = ScenesConfig(**recipes.settings(path, "scenes"))
    assert config.only_boxes == config.first_input_share == 0.25
    earlier = options.plain(config)
    earlier["plain_captions"] = earlier.pop("only_boxes")
    assert options.differences(config, earlier) == []
    assert options.differences(dataclasses.replace(config, only_boxes=0.5), earlier) == ["only_boxes was 0.25, is 0.5"]
    for both in ("only_boxes: 0.5, plain_captions: 0.25", "plain_captions: 0.25, only_boxes: 0.5"):
        path.write_text(f"scenes: {{{both}}}")
        with pytest.raises(ValueError, match="plain_captions is an earlier name of only_boxes; give one of them"):
            recipes.settings(path, "scenes")
    path.write_text("denoiser: {plain_captions: 0.25}")
    assert recipes.settings(path, "denoiser") == {"plain_captions": 0.25}


def test_the_average_stays_the_same_tensors_in_a_continued_run():
    model = torch.nn.Linear(2, 2)
    run = Run(model, Own(**CPU))
    held, saved = run.average_of(model.weight), state_of(Own(**CPU))
    wanted = saved["ema"]["shadow_params"][0].clone()
    assert not torch.equal(held, wanted)
    run.restore(saved)
    assert run.average_of(model.weight) is held and torch.equal(held, wanted)
