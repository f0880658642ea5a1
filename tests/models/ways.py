"""A small model by each of the ways on which it is used, for the tests of what people hand over by mistake.

The ways: UNet (or the autoencoder) itself, a diffusers pipeline under `ldmfast.optimize`, ldmfast's own pipeline, and
`ldmfast sample`.
"""

from __future__ import annotations

import diffusers
import tiny
import torch
from lora_pipelines import stable_diffusion_xl

import ldmfast
from ldmfast import UNet
from ldmfast.commands import cli
from ldmfast.conditioning.base import Conditioner
from ldmfast.conditioning.classes_and_boxes import ClassEmbedder
from ldmfast.conditioning.condition import Condition
from ldmfast.models.autoencoder import AutoencoderKL
from ldmfast.pipeline import LatentDiffusionPipeline

SMALL = {
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "sample_size": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
XL = {"block_out_channels": (16, 32), "layers_per_block": 1, "transformer_layers_per_block": 1, "sample_size": 8}


def unet(family="sd1", **changes):
    return UNet.from_unet(tiny.unet(family, **{**(XL if family == "sdxl" else SMALL), **changes}))


def call(family="sd1", /, **changed):
    """One call of a small U-Net, one argument of it changed."""
    model = unet(family)
    return model(**{**tiny.inputs(model, (8, 8)), **changed})


def stock_pipeline(scheduler=None, kind=diffusers.StableDiffusionPipeline, network=None, **more):
    """diffusers' own, for prompts that are encoded already, under `optimize`."""
    absent = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    parts = {**absent, "image_encoder": None, "requires_safety_checker": False, **more}
    if kind is diffusers.StableDiffusionControlNetPipeline:
        parts.pop("image_encoder")
    scheduler = scheduler or diffusers.DDIMScheduler(clip_sample=False, steps_offset=1, beta_schedule="scaled_linear")
    pipe = kind(vae=tiny.vae(), unet=network or tiny.unet(**SMALL), scheduler=scheduler, **parts)
    pipe.set_progress_bar_config(disable=True)
    return ldmfast.optimize(pipe)


def optimized(scheduler=None, kind=diffusers.StableDiffusionPipeline, network=None, parts=None, width=32, **changed):
    pipe = stock_pipeline(scheduler, kind, network, **(parts or {}))
    prompt = {name: torch.randn(1, 7, width) for name in ("prompt_embeds", "negative_prompt_embeds")}
    return pipe(**{"num_inference_steps": 2, "output_type": "np", **prompt, **changed})


def optimized_xl(**changed):
    """Two steps of a small SDXL with its text towers, one argument changed."""
    pipe = ldmfast.optimize(stable_diffusion_xl())
    width = pipe.unet.config.cross_attention_dim
    prompt = {"prompt_embeds": torch.randn(1, 7, width), "pooled_prompt_embeds": torch.randn(1, 32)}
    prompt |= {f"negative_{name}": torch.zeros_like(value) for name, value in prompt.items()}
    return pipe(**{"num_inference_steps": 2, "height": 32, "width": 32, "output_type": "np", **prompt, **changed})


class Given(Conditioner):
    """Conditions of these shapes, n pictures in place of None."""

    mode = "crossattn"

    def __init__(self, **shapes):
        super().__init__()
        self.shapes = shapes

    def forward(self, inputs):
        return self.empty(len(inputs))

    def empty(self, n):
        return Condition(
            **{k: torch.randn([n if side is None else side for side in v]) for k, v in self.shapes.items()}
        )


def ours(**parts):
    made = {
        "unet": unet(cross_attention_dim=8),
        "vae": AutoencoderKL.from_vae(tiny.vae()),
        "scheduler": diffusers.DDIMScheduler(clip_sample=False),
        "conditioner": ClassEmbedder(3, 8),
    }
    return LatentDiffusionPipeline(**{**made, **parts})


def pipeline(**changed):
    return ours()([1], **{"steps": 2, **changed})


def said_by_sample(folder, out, capsys, *arguments):
    """What `ldmfast sample` prints to stderr, having failed."""
    options = ["--model", str(folder), "-o", str(out), "--quiet", "--class", "1"]
    steps = [] if "--steps" in arguments else ["--steps", "2"]
    assert cli.main(["sample", *options, *steps, *arguments]) == 2
    said = capsys.readouterr().err.strip()
    assert len(said.splitlines()) == 1 and said.startswith("ldmfast: ")
    return said


def residuals(count=4, channels=16):
    """As a ControlNet for the small U-Net leaves them, or one for another."""
    shapes = [(2, channels, 8, 8), (2, channels, 8, 8), (2, channels, 4, 4), (2, 2 * channels, 4, 4)][:count]
    down = [torch.zeros(shape) for shape in shapes]
    return {
        "down_block_additional_residuals": down,
        "mid_block_additional_residual": torch.zeros(2, 2 * channels, 4, 4),
    }


def adapters(*shapes):
    return {"down_intrablock_additional_residuals": [torch.zeros(2, *shape) for shape in shapes]}


def controlled():
    """A ControlNet of another model's in a pipeline."""
    control = diffusers.ControlNetModel.from_unet(
        tiny.unet(**{**SMALL, "layers_per_block": 2}), conditioning_embedding_out_channels=(16, 32, 32)
    )
    kind = diffusers.StableDiffusionControlNetPipeline
    options = {"image": torch.rand(1, 3, 32, 32), "height": 32, "width": 32}
    return optimized(kind=kind, parts={"controlnet": control}, **options)


def added(text=(2, 32), ids=(2, 6)):
    return {"added_cond_kwargs": {"text_embeds": torch.zeros(text), "time_ids": torch.zeros(ids)}}
