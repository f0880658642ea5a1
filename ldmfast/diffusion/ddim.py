"""`DDIMScheduler`: diffusers' DDIMScheduler whose step is one op, with guidance in the same pass."""

from __future__ import annotations

import diffusers
import torch
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor

from ldmfast import ops
from ldmfast.diffusion.configuration import adopted, check_steps
from ldmfast.diffusion.guidance import guide


class DDIMScheduler(diffusers.DDIMScheduler):
    """Constructed, configured, loaded and saved as diffusers' DDIMScheduler is. `step` also takes `guidance`.

    a, b are the cumulative products at t and at the time before it, e the predicted noise, s = 0 where eta is:
        x0 = (x - sqrt(1 - a) e) / sqrt(a)
        s  = eta sqrt((1 - b) / (1 - a) (1 - a / b))
        x  = sqrt(b) x0 + sqrt(1 - b - s^2) e + s noise
    Source: Song et al. 2020 (arXiv 2010.02502), formulas 12 and 16.
    """

    stock = diffusers.DDIMScheduler

    @classmethod
    def adopt(cls, scheduler: diffusers.DDIMScheduler) -> DDIMScheduler:
        """Ours of the same configuration."""
        return adopted(cls, scheduler)

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """As the parent does. Raises ValueError for less than one step or more than the schedule was trained with."""
        check_steps(num_inference_steps)
        super().set_timesteps(num_inference_steps, device)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: torch.Generator | None = None,
        variance_noise: torch.Tensor | None = None,
        return_dict: bool = True,
        *,
        guidance: float | None = None,
    ) -> DDIMSchedulerOutput | tuple:
        """x_t [N, ...] to x_{t-1}.

        model_output  [N, ...]; with `guidance`, [2N, ...], the unconditional half first, combined here as
                      u + guidance * (c - u)
        The other arguments are the parent's. Dynamic thresholding and use_clipped_model_output run as the parent's
        step. Raises ValueError before set_timesteps, or if noise and a generator are both given.
        """
        if self.num_inference_steps is None:
            raise ValueError("the number of steps is not set: call set_timesteps first")
        if self.config.thresholding or (use_clipped_model_output and self.config.clip_sample):
            combined = model_output if guidance is None else guide(model_output, guidance)
            return super().step(
                combined, timestep, sample, eta, use_clipped_model_output, generator, variance_noise, return_dict
            )
        alpha_t, alpha_prev, sigma = self._alphas(timestep, eta)
        noise = _noise(sample, model_output, generator, variance_noise) if eta > 0 else None
        clip = self.config.clip_sample_range if self.config.clip_sample else None
        prev, x0 = ops.ddim_step(
            sample,
            model_output,
            alpha_t,
            alpha_prev,
            guidance=guidance,
            sigma=sigma,
            noise=noise,
            prediction=self.config.prediction_type,
            clip=clip,
        )
        return DDIMSchedulerOutput(prev_sample=prev, pred_original_sample=x0) if return_dict else (prev, x0)

    def _alphas(self, timestep: int | torch.Tensor, eta: float) -> tuple:
        """The cumulative products now and after the step, and sigma: floats, or tensors if the timestep is on a GPU.

        A timestep on a GPU is never read back, so that a loop of steps does not wait for the device.
        """
        stride = self.config.num_train_timesteps // self.num_inference_steps
        if isinstance(timestep, torch.Tensor) and timestep.device.type != "cpu":
            return self._alphas_on(timestep, timestep - stride, eta)
        now = int(timestep)
        before = now - stride
        alpha_t = self.alphas_cumprod[now].item()
        alpha_prev = (self.alphas_cumprod[before] if before >= 0 else self.final_alpha_cumprod).item()
        sigma = eta * self._get_variance(now, before).item() ** 0.5 if eta else 0.0
        return alpha_t, alpha_prev, sigma

    def _alphas_on(self, now: torch.Tensor, before: torch.Tensor, eta: float) -> tuple:
        alphas = self.alphas_cumprod = self.alphas_cumprod.to(now.device)  # once, as the parent's add_noise does
        final = self.final_alpha_cumprod = self.final_alpha_cumprod.to(now.device)
        alpha_t = alphas.take(now).double()  # indexing by a 0-d tensor would read it back
        alpha_prev = torch.where(before >= 0, alphas.take(before.clamp(min=0)), final).double()
        if not eta:
            return alpha_t, alpha_prev, 0.0
        variance = (1 - alpha_prev) / (1 - alpha_t) * (1 - alpha_t / alpha_prev)
        return alpha_t, alpha_prev, eta * variance.clamp(min=0) ** 0.5


def _noise(sample, model_output, generator, variance_noise) -> torch.Tensor:
    """The step's noise: given, or drawn as the parent draws it, so that a seed gives the same picture."""
    if variance_noise is None:
        return randn_tensor(sample.shape, generator=generator, device=model_output.device, dtype=model_output.dtype)
    if generator is not None:
        raise ValueError("both generator and variance_noise were given; give one")
    return variance_noise
