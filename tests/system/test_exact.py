"""The contract `exact` on whole pictures: the same bits in any batch, at any number of threads, in every run.

The small form of bench/checks/exact.py, which draws with each sampler of each shipped model.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import tiny
import torch
from test_door import stable_diffusion
from tiny_pipelines import class_conditional, half_mask, picture

import ldmfast
from ldmfast import ops
from ldmfast.commands import cli
from ldmfast.diffusion.samplers import SAMPLERS, make_sampler
from ldmfast.pipeline import LatentDiffusionPipeline
from ldmfast.pipeline.call import SamplingOptions

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # numpy's, about diffusers
CAT = {"object": "cat", "box": [0.1, 0.1, 0.5, 0.6]}
INPUTS = {
    "emoji320": ["a cat on a blue background", "a bee", "a red apple on a yellow background", "a sun", "two cars"],
    "scenes64": [{"class": "frog"}, {"boxes": [CAT]}, {"map": torch.eye(64, dtype=torch.int64)}, {"class": "pig"}, {}],
}


@pytest.fixture(autouse=True)
def threads_restored():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    assert ops.chosen_numerics() == "fast"


def same_bits(draw, batches, threads=(1, 4)):
    """draw(count) -> tensors of the first `count` pictures: each as in the largest batch, drawn first in one thread."""
    torch.set_num_threads(1)
    with ldmfast.numerics("exact"):
        wanted = draw(max(batches))
        for number in threads:
            torch.set_num_threads(number)
            for batch in batches:
                for got, all_ in zip(draw(batch), wanted, strict=True):
                    assert torch.isfinite(got).all() and torch.equal(got, all_[:batch]), (batch, number)


@pytest.mark.parametrize("model", INPUTS)
def test_pictures_of_the_shipped_models(model):
    pipe = LatentDiffusionPipeline.from_pretrained(model)

    def draw(count):
        options = SamplingOptions(make_sampler("euler-a", pipe.scheduler), 10, pipe.guidance)
        latents = pipe.denoise(INPUTS[model][:count], list(range(count)), options)
        return latents, pipe.decode(latents)

    same_bits(draw, (1, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_sixteen_bits(dtype):
    pipe = LatentDiffusionPipeline.from_pretrained("emoji320", dtype=dtype)
    options = SamplingOptions(pipe.scheduler, 3, 3.0, rescale=0.5)
    same_bits(lambda count: [pipe.denoise(INPUTS["emoji320"][:count], list(range(count)), options)], (1, 3))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_each_sampler(sampler):
    pipe = class_conditional()

    def draw(count):
        options = SamplingOptions(make_sampler(sampler, pipe.scheduler), 4, 3.0, rescale=0.3)
        canvas = pipe.canvas(count, (24, 12), picture(width=24, height=12), half_mask(width=24, height=12))
        return [
            pipe.denoise([i % 3 for i in range(count)], list(range(count)), options),
            pipe.denoise([i % 3 for i in range(count)], list(range(count)), options, canvas),
        ]

    same_bits(draw, (1, 3), threads=(2,))


def hooked(unet):
    unet.conv_in.register_forward_hook(lambda *_: None)
    unet.down_blocks[0].resnets[0].register_forward_hook(lambda *_: None)
    unet.mid_block.attentions[0].transformer_blocks[0].register_forward_hook(lambda *_: None)


ATTACHED = {"nothing": lambda unet: None, "hooks": hooked, "fused": lambda unet: unet.fuse_qkv_projections()}


@pytest.mark.parametrize("attached", ATTACHED)
def test_a_network_with_parts_of_stock(attached):
    unet = ldmfast.UNet.from_unet(tiny.unet())
    ATTACHED[attached](unet)
    assert (unet.explain() == []) == (attached == "nothing")
    arguments = tiny.inputs(unet, size=(9, 7), batch=5)
    arguments["timestep"] = 100 * torch.arange(5) + 7
    arguments["encoder_attention_mask"] = (torch.rand(5, 7) > 0.3).long()

    def draw(count):
        mine = {k: v[:count] if isinstance(v, torch.Tensor) and v.dim() else v for k, v in arguments.items()}
        with torch.no_grad():
            return [unet(**mine).sample]

    same_bits(draw, (1, 2, 5))


def test_autoencoders():
    torch.manual_seed(1)
    vae = ldmfast.AutoencoderKL.adopt(tiny.vae())
    vq = ldmfast.VQModel(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        num_vq_embeddings=64,
    ).eval()
    x = torch.rand(5, 3, 10, 14) * 2 - 1

    @torch.no_grad()
    def draw(count):
        posterior = vae.encode(x[:count]).latent_dist
        latents = vq.encode(x[:count]).latents
        return posterior.mean, posterior.std, vae.decode(posterior.mean).sample, latents, vq.decode(latents).sample

    same_bits(draw, (1, 2, 5))


def test_a_pipeline_of_diffusers_in_a_block():
    """Its text encoder and schedulers are PyTorch's own; `fixed_order` brings them in."""
    pipe = ldmfast.optimize(stable_diffusion())
    pipe.set_progress_bar_config(disable=True)

    def draw(count):
        generators = [torch.Generator().manual_seed(i) for i in range(count)]
        prompts = ["a cat", "dog", "a red bus", "sea", "an owl"][:count]
        settings = {"num_inference_steps": 4, "guidance_scale": 7.5, "height": 32, "width": 48, "output_type": "pt"}
        with ldmfast.fixed_order():
            return [pipe(prompts, generator=generators, **settings).images]

    same_bits(draw, (1, 2, 5))


def test_the_choice_holds_in_every_thread_and_is_explained():
    unet, said = ldmfast.UNet.from_unet(tiny.unet()), []
    with ldmfast.numerics("exact"):
        thread = threading.Thread(target=lambda: said.extend(unet.explain()))
        thread.start()
        thread.join()
    assert said == [
        "The numerical contract is exact: the same bits in any batch and at any number of threads, on a CPU."
    ]
    assert unet.explain() == []


def test_the_command_line(tmp_path, monkeypatch):
    seen = []
    call = LatentDiffusionPipeline.__call__
    monkeypatch.setattr(
        LatentDiffusionPipeline, "__call__", lambda *a, **k: seen.append(ops.chosen_numerics()) or call(*a, **k)
    )
    class_conditional().save_pretrained(tmp_path / "model")
    drawn = []
    for batch in ("1", "3", "16"):
        out = tmp_path / f"{batch}.png"
        options = ["--model", str(tmp_path / "model"), "--steps", "3", "--sampler", "euler-a", "--quiet", "-n", "3"]
        assert cli.main(["sample", "--class", "1", "2", "-o", str(out), "--exact", "--batch", batch, *options]) == 0
        drawn.append(out.read_bytes())
    assert drawn[0] == drawn[1] == drawn[2] and seen == ["exact"] * 3
    assert cli.main(["sample", "--class", "1", "-o", str(tmp_path / "a.png"), *options]) == 0 and seen[3] == "fast"


@pytest.mark.parametrize(
    "value, said", [("exact", "exact"), ("", "fast"), ("Exact", "LDMFAST_NUMERICS: 'Exact' is no numerical contract")]
)
def test_the_environment(value, said):
    code = "from ldmfast import ops; print(ops.chosen_numerics())"
    environment = {**os.environ, "LDMFAST_NUMERICS": value}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert said in found.stdout + found.stderr
