"""One line on a finished diffusers pipeline."""

from __future__ import annotations

import diffusers

from ldmfast.diffusion.ddim import DDIMScheduler
from ldmfast.diffusion.pndm import PNDMScheduler
from ldmfast.models.autoencoder import AutoencoderKL
from ldmfast.models.unet import UNet
from ldmfast.models.unet2d import UNet2D
from ldmfast.models.vq import VQModel


def optimize(pipeline):
    """Put ldmfast's models under a diffusers pipeline, in place, sharing its weights; returns the pipeline.

    Its U-Net, its autoencoder and its DDIM or PNDM scheduler are taken over where they are exactly diffusers' classes;
    other parts stay as they are, and so do the pictures. The pipeline still saves, and is loaded elsewhere, as a plain
    diffusers pipeline.
    Call it before offloading or compiling. Raises ValueError if there is nothing to take over, or if it is offloaded.
    """
    taken = {}
    for name, component in pipeline.components.items():
        if type(component) is diffusers.UNet2DConditionModel:
            taken[name] = UNet.from_unet(component)
        elif type(component) is diffusers.UNet2DModel:
            taken[name] = UNet2D.from_unet(component)
        elif type(component) is diffusers.AutoencoderKL:
            taken[name] = AutoencoderKL.from_vae(component)
        elif type(component) is diffusers.VQModel:
            taken[name] = VQModel.from_vq(component)
        elif type(component) is diffusers.DDIMScheduler:
            taken[name] = DDIMScheduler.from_config(component.config)
        elif type(component) is diffusers.PNDMScheduler:
            taken[name] = PNDMScheduler.from_config(component.config)
            taken[name].history = component.config.prediction_type  # as diffusers extrapolates: the same pictures
    if not taken:
        wanted = "UNet2DConditionModel, UNet2DModel, AutoencoderKL, VQModel, DDIMScheduler or PNDMScheduler"
        raise ValueError(f"{type(pipeline).__name__} has no {wanted}")
    for name, component in taken.items():
        saved_as = pipeline.config[name]
        setattr(pipeline, name, component)
        pipeline.register_to_config(**{name: saved_as})  # so that model_index.json names diffusers' class
    return pipeline
