"""Pipelines of pictures, saved: the folder draws the same, and a save that fails leaves what was there."""

from __future__ import annotations

import pytest
import torch
from tiny_pipelines import array, class_conditional, half_mask, picture, unconditional

from ldmfast.conditioning.spatial import LowResolution, MaskedImage
from ldmfast.diffusion.samplers import make_sampler
from ldmfast.pipeline import LatentDiffusionPipeline

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # numpy's, about diffusers


@pytest.mark.parametrize("kind", ["class", "nothing", "masked", "small"])
def test_saving_and_loading_keeps_the_picture(tmp_path, kind):
    pipe, inputs, given = {
        "class": (class_conditional, 2, {}),
        "nothing": (unconditional, None, {}),
        "masked": (
            lambda: class_conditional(9, pictures=MaskedImage(5, style="sd")),
            1,
            {"image": picture(), "mask": half_mask()},
        ),
        "small": (lambda: unconditional(7, LowResolution(3)), None, {"image": picture(width=4, height=4)}),
    }[kind]
    pipe = pipe()
    pipe.guidance, pipe.scheduler = 2.5, make_sampler("plms", pipe.scheduler)
    pipe.save_pretrained(tmp_path)
    again = LatentDiffusionPipeline.from_pretrained(tmp_path)
    assert again.guidance == 2.5 and type(again.scheduler) is type(pipe.scheduler)
    assert (array(pipe(inputs, steps=3, **given)[0]) == array(again(inputs, steps=3, **given)[0])).all()
    assert not any("_name_or_path" in p.read_text() for p in tmp_path.glob("*/config.json"))
    with pytest.raises(ValueError, match="text_encoder='minilm', but .* has no other to replace"):
        LatentDiffusionPipeline.from_pretrained(tmp_path, text_encoder="minilm")


def test_a_save_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    home, pipe = tmp_path / "saved", class_conditional()
    pipe.save_pretrained(home)
    (home / "README.md").write_text("mine")
    before = {p: p.read_bytes() for p in home.rglob("*") if p.is_file()}
    with monkeypatch.context() as patch:
        patch.setattr(type(pipe.vae), "save_pretrained", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            class_conditional().save_pretrained(home)
    assert before == {p: p.read_bytes() for p in home.rglob("*") if p.is_file()}
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]
    pipe.save_pretrained(home, dtype=torch.float16)
    assert (home / "README.md").read_text() == "mine" and not any(home.rglob("*.old"))
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert (home / weights).stat().st_size < 0.7 * len(before[home / weights])
