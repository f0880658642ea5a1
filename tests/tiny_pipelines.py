"""Pipelines of tiny random networks that draw pictures of 16x16, and pictures and masks for them."""

from __future__ import annotations

import diffusers
import numpy as np
import tiny
import torch
from PIL import Image

from ldmfast import UNet
from ldmfast.conditioning.classes_and_boxes import ClassEmbedder
from ldmfast.conditioning.hybrid import Hybrid
from ldmfast.diffusion.samplers import make_sampler
from ldmfast.models import AutoencoderKL
from ldmfast.models.unet2d import UNet2D
from ldmfast.pipeline import LatentDiffusionPipeline
from ldmfast.pipeline.call import SamplingOptions


def autoencoder(z=4):
    """Its latents of noise pictures have deviation 1, as a trained one's have of its pictures."""
    torch.manual_seed(3)
    vae = AutoencoderKL.adopt(tiny.vae(latent_channels=z))
    with torch.no_grad():
        spread = vae.encode(tensor(picture())[None]).latent_dist.mode().std().item()
    vae.register_to_config(scaling_factor=1 / spread)
    return vae


def scheduler(**config):
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return diffusers.DDIMScheduler(**betas, clip_sample=False, timestep_spacing="trailing", **config)


def class_conditional(channels=4, **members):
    """A class-conditional pipeline of 16x16 pictures; with members, a hybrid of the class and those."""
    torch.manual_seed(4)
    small = {
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "sample_size": 4,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "attention_head_dim": 2,
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    unet = UNet.from_unet(tiny.unet(**small, in_channels=channels, cross_attention_dim=8))
    conditioner = ClassEmbedder(3, 8)
    if members:
        conditioner = Hybrid(**{"class": conditioner}, **members)
    return LatentDiffusionPipeline(unet, autoencoder(), scheduler(), conditioner)


def unconditional(channels=4, conditioner=None):
    torch.manual_seed(5)
    unet = UNet2D(
        sample_size=4,
        in_channels=channels,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=8,
    )
    return LatentDiffusionPipeline(unet, autoencoder(), scheduler(), conditioner)


def picture(seed=0, width=16, height=16):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def half_mask(width=16, height=16):
    mask = Image.new("L", (width, height))
    mask.paste(255, (width // 2, 0, width, height))
    return mask


def array(picture):
    return np.asarray(picture).astype(int)


def batch_difference(pipeline, name, steps=6):
    """Relative difference (norms) of three pictures' latents from the same seeds drawn one by one, noise included."""
    options = SamplingOptions(make_sampler(name, pipeline.scheduler), steps, guidance=3.0)
    inputs, seeds = [0, 2, 1], [7, 1, 4]
    together = pipeline.denoise(inputs, seeds, options)
    alone = torch.cat([pipeline.denoise([i], [s], options) for i, s in zip(inputs, seeds, strict=True)])
    assert not torch.equal(together[:1], together[1:2])
    return ((together - alone).norm() / alone.norm()).item()


def tensor(picture):
    return torch.from_numpy(np.asarray(picture).astype(np.float32) / 127.5 - 1).permute(2, 0, 1)
