"""Latents as a denoiser gives them: what a decoder is to draw, once it is finished, in place of an encoder's.

A picture's latents get noise to a time early in the schedule and are denoised from there with the picture's caption and
the model's guidance, as in img2img. The arrangement stays the picture's, the details become the denoiser's, and the
decoder, compared with the picture, learns to set them right.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import torch

from ldmfast.conditioning import Condition
from ldmfast.diffusion import sampling
from ldmfast.diffusion.samplers import make_sampler
from ldmfast.models.encode_decode import scaled, unscaled
from ldmfast.pipeline import LatentDiffusionPipeline
from ldmfast.training import condition_sources

STEPS = 16  # of the whole schedule; the last few are gone through


class DenoisedLatents:
    """Gives back the latents of the pictures `rows`, noised and denoised by a pipeline.

    pipeline  its conditioner reads captions, and its autoencoder has the latents of the one in training
    rows      N of metadata.jsonl
    folder    as of condition_sources.gather
    most      the noise is that of a time in the first part of the schedule, at most this one, in 0..1
    Raises ValueError where the pipeline draws latents of another shape than `shape` (z, h, w), or no step is left.
    """

    def __init__(
        self,
        pipeline: LatentDiffusionPipeline,
        rows: list[dict],
        shape: torch.Size,
        most: float,
        folder: str | Path | None = None,
    ):
        config = pipeline.unet.config
        wanted = (config.out_channels, config.sample_size, config.sample_size)
        if tuple(shape) != wanted:
            raise ValueError(f"denoiser: it draws latents {wanted}, the autoencoder's are {tuple(shape)}")
        self.steps = int(STEPS * most)
        if self.steps < 1:
            raise ValueError(f"denoised_most={most} must be at least {1 / STEPS}, for a step to be left")
        self.pipeline = pipeline
        options = SimpleNamespace(first_input_share=0.5, guidance_dropout=0.0)
        described = map(condition_sources.captions, rows)
        self.source = condition_sources.gather(pipeline.conditioner, described, options, pipeline.unet.device, folder)

    @torch.no_grad()
    def __call__(self, z: torch.Tensor, index: torch.Tensor, step) -> torch.Tensor:
        """Unscaled latents z [B, c, h, w] of the pictures `index` [B] -> the same, as the denoiser gives them back.

        step  Step, of which the noise and the time are drawn
        """
        pipe = self.pipeline
        skipped = STEPS - 1 - int(step.integers(self.steps)[0])
        scheduler, guidance = make_sampler("ddim", pipe.scheduler), pipe.guidance
        times = sampling.begin_at(scheduler, STEPS, skipped, z.device)
        condition = self.source.conditions_of(index, step)
        if guidance != 1:
            empty = pipe.conditioner.empty(len(z)).to(step.device, torch.float32)
            condition = Condition.cat([empty, condition])

        def predict(x, t):
            return condition.predict(pipe.unet, torch.cat([x] * (1 if guidance == 1 else 2)), t)

        x = sampling.starting_point(scheduler, times, step.normal(*z.shape[1:]), scaled(pipe.vae, z))
        x = sampling.sample(predict, x, scheduler, times, guidance=None if guidance == 1 else guidance)
        return unscaled(pipe.vae, x)
