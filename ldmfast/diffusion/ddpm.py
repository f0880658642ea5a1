"""`DDPMScheduler`: diffusers' DDPMScheduler, ancestral sampling, whose step is one op."""

from __future__ import annotations

import diffusers
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor

from ldmfast import ops
from ldmfast.diffusion.configuration import adopted, check_steps
from ldmfast.diffusion.guidance import guide


class DDPMScheduler(diffusers.DDPMScheduler):
    """Constructed, configured, loaded and saved as diffusers' DDPMScheduler is. `step` also takes `guidance`.

    a, b are the cumulative products at t and at the time before it, e the predicted noise:
        x0 = (x - sqrt(1 - a) e) / sqrt(a)
        v  = (1 - b) / (1 - a) (1 - a / b)
        x  = sqrt(b) x0 + sqrt(1 - b - v) e + sqrt(v) noise
    Source: Ho et al. 2020 (arXiv 2006.11239), algorithm 2 and formula 7; on fewer steps than were trained, Song et al.
    2020 (arXiv 2010.02502), formula 16 with eta 1, of which it is a case.
    """

    stock = diffusers.DDPMScheduler

    @classmethod
    def adopt(cls, scheduler: diffusers.DDPMScheduler) -> DDPMScheduler:
        """Ours of the same configuration."""
        return adopted(cls, scheduler)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: list[int] | None = None,
    ) -> None:
        """As the parent does. Raises ValueError for less than one step or more than the schedule was trained with."""
        check_steps(num_inference_steps)
        super().set_timesteps(num_inference_steps, device, timesteps)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
        *,
        guidance: float | None = None,
    ) -> DDPMSchedulerOutput | tuple:
        """x_t [N, ...] to a draw of x_{t-1}, its noise from `generator`, one or N of them.

        model_output  [N, ...]; with `guidance`, [2N, ...], the unconditional half first
        A clipped or thresholded x0 and other variances than "fixed_small" run as the parent's step.
        """
        if self.config.clip_sample or self.config.thresholding or self.variance_type != "fixed_small":
            combined = model_output if guidance is None else guide(model_output, guidance)
            return super().step(combined, timestep, sample, generator, return_dict)
        t = int(timestep)
        before = int(self.previous_timestep(t))
        alpha_t = self.alphas_cumprod[t].item()
        alpha_prev = self.alphas_cumprod[before].item() if before >= 0 else 1.0
        variance = max((1 - alpha_prev) / (1 - alpha_t) * (1 - alpha_t / alpha_prev), 0.0)
        noise = None
        if variance:
            noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)
        prev, x0 = ops.ddim_step(
            sample,
            model_output,
            alpha_t,
            alpha_prev,
            guidance=guidance,
            sigma=variance**0.5,
            noise=noise,
            prediction=self.config.prediction_type,
        )
        return DDPMSchedulerOutput(prev_sample=prev, pred_original_sample=x0) if return_dict else (prev, x0)
