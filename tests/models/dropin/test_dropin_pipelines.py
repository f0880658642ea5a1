"""`UNet` and `optimize` in diffusers pipelines, with prompts already encoded, beside the stock pipeline."""

from __future__ import annotations

import copy
import json

import diffusers
import numpy
import pytest
import tiny
import torch
from both_networks import pair, randomise, sequential_offload

from ldmfast.models.autoencoder import AutoencoderKL
from ldmfast.models.unet import UNet
from ldmfast.pipeline.optimize import optimize


def components(family="sd1", **changes):
    return {
        "vae": tiny.vae(),
        "unet": tiny.unet(family, **changes),
        "scheduler": diffusers.DDIMScheduler(clip_sample=False, steps_offset=1, beta_schedule="scaled_linear"),
        "text_encoder": None,
        "tokenizer": None,
    }


def stable_diffusion(kind=diffusers.StableDiffusionPipeline, family="sd1", extra=None, **changes):
    parts = {**components(family, **changes), **(extra or {})}
    if kind not in (diffusers.StableDiffusionXLPipeline,):
        parts |= {"safety_checker": None, "feature_extractor": None}
    if kind in (diffusers.StableDiffusionPipeline, diffusers.StableDiffusionPAGPipeline):
        parts |= {"requires_safety_checker": False, "image_encoder": None}
    pipe = kind(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def prompt(width=32):
    generator = torch.Generator().manual_seed(2)
    embeds = torch.randn(2, 1, 7, width, generator=generator)
    return {"prompt_embeds": embeds[0], "negative_prompt_embeds": embeds[1]}


def draw(pipe, **arguments):
    arguments = {"num_inference_steps": 3, "output_type": "np", **prompt(), **arguments}
    return pipe(**arguments, generator=torch.Generator().manual_seed(4)).images


def picture(channels=3):
    return torch.rand(1, channels, 32, 32, generator=torch.Generator().manual_seed(3))


def with_ours(pipe):
    """A copy of the pipeline's parts under ours."""
    return optimize(copy.deepcopy(pipe))


PIPELINES = {
    "text to image": (lambda: stable_diffusion(), {"height": 64, "width": 48}),
    "image to image": (
        lambda: stable_diffusion(diffusers.StableDiffusionImg2ImgPipeline, extra={"image_encoder": None}),
        {"image": picture(), "strength": 0.9},
    ),
    "inpainting, 4 channels": (
        lambda: stable_diffusion(diffusers.StableDiffusionInpaintPipeline, extra={"image_encoder": None}),
        {"image": picture(), "mask_image": picture(1), "height": 32, "width": 32, "strength": 0.9},
    ),
    "inpainting, 9 channels": (
        lambda: stable_diffusion(diffusers.StableDiffusionInpaintPipeline, "inpainting", {"image_encoder": None}),
        {"image": picture(), "mask_image": picture(1), "height": 32, "width": 32},
    ),
    "instruct pix2pix": (
        lambda: stable_diffusion(
            diffusers.StableDiffusionInstructPix2PixPipeline, extra={"image_encoder": None}, in_channels=8
        ),
        {"image": picture()},
    ),
    "latent consistency": (
        lambda: stable_diffusion(
            diffusers.LatentConsistencyModelPipeline,
            extra={"scheduler": diffusers.LCMScheduler(), "image_encoder": None},
            time_cond_proj_dim=12,
        ),
        {"height": 32, "width": 32},
    ),
    "perturbed attention guidance": (
        lambda: stable_diffusion(diffusers.StableDiffusionPAGPipeline),
        {"height": 32, "width": 32, "pag_scale": 3.0},
    ),
}


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_draws_the_same_picture(name):
    make, arguments = PIPELINES[name]
    pipe = make()
    ours = with_ours(pipe)
    assert type(ours.unet) is UNet and type(ours.vae).__module__.startswith("ldmfast")
    wanted, got = draw(pipe, **arguments), draw(ours, **arguments)
    assert numpy.abs(got - wanted).max() <= 1e-3 and wanted.std() > 0.01


def test_controlnet():
    torch.manual_seed(0)
    parts = components()
    control = diffusers.ControlNetModel.from_unet(
        UNet.from_unet(parts["unet"]), conditioning_embedding_out_channels=(16, 32, 32)
    )
    randomise(control, 0.05)
    pipe = diffusers.StableDiffusionControlNetPipeline(
        **parts, controlnet=control, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    arguments = {"image": torch.rand(1, 3, 64, 64), "height": 64, "width": 64}
    for guess_mode in (False, True):
        wanted, got = (draw(p, **arguments, guess_mode=guess_mode) for p in (pipe, with_ours(pipe)))
        assert numpy.abs(got - wanted).max() <= 1e-3


def test_sdxl():
    absent = {"text_encoder_2": None, "tokenizer_2": None, "image_encoder": None}
    pipe = stable_diffusion(diffusers.StableDiffusionXLPipeline, "sdxl", absent)
    arguments = {
        **prompt(64),
        "pooled_prompt_embeds": torch.ones(1, 32),
        "negative_pooled_prompt_embeds": torch.zeros(1, 32),
        "height": 32,
        "width": 32,
    }
    wanted, got = draw(pipe, **arguments), draw(with_ours(pipe), **arguments)
    assert numpy.abs(got - wanted).max() <= 1e-3


def test_an_optimized_pipeline_saves_as_a_stock_one(tmp_path):
    ours = with_ours(stable_diffusion())
    ours.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"] and index["vae"] == ["diffusers", "AutoencoderKL"]
    absent = {"safety_checker": None, "feature_extractor": None, "text_encoder": None, "tokenizer": None}
    loaded = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path, **absent)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.unet) is diffusers.UNet2DConditionModel
    arguments = {"height": 32, "width": 32}
    assert numpy.abs(draw(loaded, **arguments) - draw(ours, **arguments)).max() <= 1e-3
    again = diffusers.StableDiffusionPipeline.from_pretrained(
        tmp_path, **absent, unet=UNet.from_pretrained(tmp_path, subfolder="unet")
    )
    assert type(again.unet) is UNet


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_an_optimized_plms_draws_the_same_picture(prediction):
    pipe = stable_diffusion()
    pipe.scheduler = diffusers.PNDMScheduler(skip_prk_steps=True, prediction_type=prediction)
    ours = with_ours(pipe)
    assert type(ours.scheduler).__module__ == "ldmfast.diffusion.pndm"
    arguments = {"height": 32, "width": 32, "num_inference_steps": 6}
    assert numpy.abs(draw(ours, **arguments) - draw(pipe, **arguments)).max() <= 1e-3


@pytest.mark.parametrize("kind", [diffusers.DDIMScheduler, diffusers.DDPMScheduler, diffusers.PNDMScheduler])
def test_another_scheduler_made_of_an_optimized_ones_configuration_is_that_made_of_stocks(kind):
    """Values that were not named are the other class's defaults again: Euler's spacing is not DDIM's."""
    pipe = stable_diffusion()
    pipe.scheduler = kind(beta_schedule="scaled_linear")
    ours = with_ours(pipe)
    made = [diffusers.EulerDiscreteScheduler.from_config(p.scheduler.config).config for p in (pipe, ours)]
    assert type(ours.scheduler) is not kind and dict(made[0]) == dict(made[1])
    assert json.loads(ours.scheduler.to_json_string())["_class_name"] == kind.__name__


def test_components_and_other_pipelines_of_the_same_parts():
    ours = with_ours(stable_diffusion())
    other = diffusers.StableDiffusionImg2ImgPipeline(**ours.components, requires_safety_checker=False)
    assert other.unet is ours.unet
    passed = diffusers.StableDiffusionPAGPipeline.from_pipe(ours, unet=ours.unet, vae=ours.vae)
    assert passed.unet is ours.unet
    there = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(ours)  # nothing handed over
    assert (there.unet, there.vae, there.scheduler) == (ours.unet, ours.vae, ours.scheduler)
    back = diffusers.StableDiffusionPipeline.from_pipe(there)
    assert back.unet is ours.unet and dict(back.config) == dict(ours.config)


def test_optimize_again_takes_over_what_was_put_there_since():
    pipe = optimize(stable_diffusion())
    parts = dict(pipe.components)
    assert optimize(pipe) is pipe and all(pipe.components[name] is part for name, part in parts.items())
    pipe.vae, pipe.scheduler = tiny.vae(), diffusers.EulerDiscreteScheduler()
    optimize(pipe)
    assert pipe.unet is parts["unet"] and type(pipe.vae) is AutoencoderKL


def test_a_pipeline_with_nothing_to_take_over_is_refused():
    pipe = stable_diffusion()
    pipe.unet.__class__ = type("TheirUNet", (diffusers.UNet2DConditionModel,), {})
    pipe.vae, pipe.scheduler = diffusers.AutoencoderTiny(), diffusers.EulerDiscreteScheduler()
    with pytest.raises(ValueError, match="has no UNet2DConditionModel.* to take over"):
        optimize(pipe)


def test_animatediff_and_register_to_config():
    _, ours = pair()
    motion = diffusers.UNetMotionModel.from_unet2d(ours, load_weights=True)
    assert torch.equal(motion.conv_in.weight, ours.conv_in.weight)
    ours.register_to_config(sample_size=24)
    assert ours.config.sample_size == 24


def test_offloaded_networks_are_not_taken_over():
    stock = tiny.unet()
    sequential_offload(stock)
    with pytest.raises(ValueError, match="forward is wrapped: take it over first"):
        UNet.from_unet(stock)
    with pytest.raises(TypeError, match="compile what adopt returns"):
        UNet.from_unet(torch.compile(tiny.unet(), backend="eager"))
