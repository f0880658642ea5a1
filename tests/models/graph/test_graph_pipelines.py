"""Graph mode in diffusers' pipelines and in ours: the same pictures, the step as one graph where it can be."""

from __future__ import annotations

import copy

import diffusers
import numpy
import pytest
import tiny
import torch
from graph_calls import SMALL
from launch_recorder import LaunchRecorder

import ldmfast
from ldmfast import DDIMScheduler, UNet
from ldmfast.conditioning.condition import Condition
from ldmfast.diffusion import sampling
from ldmfast.pipeline.captured_step import captured_step


def pipeline(kind, **more):
    parts = {
        "vae": tiny.vae(),
        "unet": tiny.unet(**SMALL),
        "scheduler": diffusers.DDIMScheduler(clip_sample=False, steps_offset=1, beta_schedule="scaled_linear"),
        "text_encoder": None,
        "tokenizer": None,
    }
    pipe = kind(**{**parts, **more})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, seed, **arguments):
    width = pipe.unet.config.cross_attention_dim
    generator = torch.Generator().manual_seed(seed)
    embeds = torch.randn(2, 1, 7, width, generator=generator)
    arguments = {"num_inference_steps": 4, "height": 32, "width": 32, **arguments}
    return pipe(
        prompt_embeds=embeds[0], negative_prompt_embeds=embeds[1], generator=generator, output_type="np", **arguments
    ).images


def text_to_image():
    safety = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return pipeline(diffusers.StableDiffusionPipeline, image_encoder=None, **safety), {}


def controlnet():
    unet = tiny.unet(**SMALL)
    control = diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(16, 32, 32))
    for x in control.parameters():
        x.data += 0.05 * torch.randn_like(x)
    safety = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipe = pipeline(diffusers.StableDiffusionControlNetPipeline, unet=unet, controlnet=control, **safety)
    return pipe, {"image": torch.rand(1, 3, 32, 32)}


def sdxl():
    absent = {"text_encoder_2": None, "tokenizer_2": None, "image_encoder": None, "feature_extractor": None}
    pipe = pipeline(diffusers.StableDiffusionXLPipeline, unet=tiny.unet("sdxl", layers_per_block=1), **absent)
    pooled = {"pooled_prompt_embeds": torch.ones(1, 32), "negative_pooled_prompt_embeds": torch.zeros(1, 32)}
    return pipe, pooled


@pytest.mark.parametrize("make", [text_to_image, controlnet, sdxl])
def test_a_diffusers_pipeline_draws_the_same_pictures(make):
    pipe, arguments = make()
    plain, replaying = (ldmfast.optimize(copy.deepcopy(pipe)) for _ in range(2))
    replaying.unet.graph(capture=LaunchRecorder())
    for seed in (1, 2):  # another prompt, whose embeddings are another tensor
        assert numpy.array_equal(draw(plain, seed, **arguments), draw(replaying, seed, **arguments))
    graphs = replaying.unet.graphs
    assert (graphs.captures, graphs.replays) == (1, 6) and graphs.eager is None


def condition(n):
    return Condition(context=torch.randn(n, 7, 32), context_mask=torch.ones(n, 7).tril(4).bool())


@pytest.mark.parametrize("guidance, prediction", [(3.0, "epsilon"), (None, "v_prediction")])
def test_a_step_of_ddim_is_one_graph(guidance, prediction):
    u = UNet.from_unet(tiny.unet(**SMALL))
    scheduler = DDIMScheduler(clip_sample=True, clip_sample_range=2.0, prediction_type=prediction)
    x = torch.randn(2, 4, 8, 8)

    def run(steps, conditioned, guidance=guidance, seen=None):
        times = sampling.begin_at(scheduler, steps, 0)
        step = captured_step(u, scheduler, times, conditioned, guidance=guidance)
        assert (step is None) is (u.graphs is None)

        def predict(x, t):
            return conditioned.predict(u, x if guidance is None else torch.cat([x, x]), t)

        def watch(i, x0):
            seen.append(x0())

        watch = None if seen is None else watch
        return sampling.sample(predict, x, scheduler, times, guidance=guidance, step=step, watch=watch)

    conditions = [condition(2 if guidance is None else 4) for _ in range(2)]
    watched, again = [], []
    wanted = [run(4, conditions[0], seen=watched), run(4, conditions[1]), run(5, conditions[1])]
    u.graph(capture=LaunchRecorder())
    found = [run(4, conditions[0], seen=again), run(4, conditions[1]), run(5, conditions[1])]
    assert all(map(torch.equal, found, wanted)) and all(map(torch.equal, again, watched))
    assert (u.graphs.captures, u.graphs.replays, len(u.graphs)) == (1, 11, 1)
    if guidance:  # it is a number in the graph
        run(4, conditions[0], guidance=5.0)
        assert u.graphs.captures == 2
        with torch.no_grad():
            u.graph(False)
            wanted = run(4, conditions[0], guidance=5.0)
            u.graph(capture=LaunchRecorder())
            assert torch.equal(run(4, conditions[0], guidance=5.0), wanted)


def test_the_samplers_configuration_is_another_graph():
    u = UNet.from_unet(tiny.unet(**SMALL)).graph(capture=LaunchRecorder())
    x, conditioned = torch.randn(2, 4, 8, 8), condition(4)
    for settings in ({"clip_sample": False}, {"clip_sample_range": 0.5}, {"prediction_type": "v_prediction"}):
        scheduler = DDIMScheduler(**settings)
        times = sampling.begin_at(scheduler, 4, 0)
        found = {}
        for on in (True, False):
            step = captured_step(u, scheduler, times, conditioned, guidance=2.0) if on else None
            found[on] = sampling.sample(
                lambda x, t: conditioned.predict(u, torch.cat([x, x]), t), x, scheduler, times, guidance=2.0, step=step
            )
        assert torch.equal(found[True], found[False])


def test_while_the_network_has_hooks_only_its_own_call_is_a_graph():
    u = UNet.from_unet(tiny.unet(**SMALL)).graph(capture=LaunchRecorder())
    scheduler, conditioned, seen = DDIMScheduler(), condition(4), []
    times = sampling.begin_at(scheduler, 4, 0)
    u.register_forward_hook(lambda m, args, y: seen.append(1))
    step = captured_step(u, scheduler, times, conditioned, guidance=2.0)
    x = torch.randn(2, 4, 8, 8)
    sampling.sample(
        lambda x, t: conditioned.predict(u, torch.cat([x, x]), t), x, scheduler, times, guidance=2.0, step=step
    )
    assert len(seen) == 4 and u.graphs.replays == 2


@pytest.mark.parametrize("sampler", ["ddim", "plms", "ddpm", "dpm++"])
def test_our_pipeline_draws_the_same_pictures(sampler):
    parts = {"vae": tiny.vae(), "scheduler": DDIMScheduler(clip_sample=False)}
    pipe = ldmfast.LatentDiffusionPipeline(
        ldmfast.UNet2D.from_unet(diffusers.UNet2DModel(**UNCONDITIONAL).eval()), **parts
    )
    wanted = [pipe(2, steps=4, seeds=seed, sampler=sampler) for seed in (1, 5)]
    pipe.unet.graph(capture=LaunchRecorder())
    found = [pipe(2, steps=4, seeds=seed, sampler=sampler) for seed in (1, 5)]
    for pictures, others in zip(wanted, found, strict=True):
        assert all(a.tobytes() == b.tobytes() for a, b in zip(pictures, others, strict=True))
    assert pipe.unet.graphs.captures == 1 and pipe.unet.graphs.replays >= 6 and pipe.unet.explain() == []


UNCONDITIONAL = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 8,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}


def test_optimize_takes_graph_and_says_what_it_lacks(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # a machine with a GPU; the network is on the CPU
    pipe = ldmfast.optimize(text_to_image()[0], graph=True)
    assert pipe.unet.graphs is not None
    assert pipe.unet.explain() == ["Graph mode is off: it is on cpu; a CUDA graph needs an NVIDIA GPU."]
    assert ldmfast.load("emoji320", graph=True).unet.graphs is not None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="graph mode needs an NVIDIA GPU"):
        ldmfast.optimize(text_to_image()[0], graph=True)
    with pytest.raises(ValueError, match="has no U-Net of ldmfast's"):
        ldmfast.optimize(pipeline(diffusers.StableDiffusionLatentUpscalePipeline, unet=None), graph=True)
