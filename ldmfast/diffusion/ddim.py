"""`DDIMScheduler`: diffusers' DDIMScheduler whose step is one op, with guidance in the same pass."""

from __future__ import annotations

import diffusers
import torch
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor

from ldmfast import ops
from ldmfast.diffusion.configuration import adopted, check_steps
from ldmfast.diffusion.guidance import guide
from ldmfast.diffusion.step_tables import StepTables, before, row_of
from ldmfast.ops.ddim_coefficients import coefficient_rows, coefficients_of


class DDIMScheduler(StepTables, diffusers.DDIMScheduler):
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
        with torch.inference_mode(False):
            super().set_timesteps(num_inference_steps, device)
        self._prepare(device, 0.0)

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
        noise = _noise(sample, model_output, generator, variance_noise) if eta > 0 else None
        table, row = self._coefficients(timestep, eta, sample)
        prev, x0 = ops.ddim_step(
            sample,
            model_output,
            table=table,
            row=row,
            guidance=guidance,
            noise=noise,
            clip=self.config.clip_sample_range if self.config.clip_sample else None,
        )
        return DDIMSchedulerOutput(prev_sample=prev, pred_original_sample=x0) if return_dict else (prev, x0)

    def _coefficients(self, timestep: int | torch.Tensor, eta: float, sample: torch.Tensor) -> tuple:
        """(the step's coefficients, None), or (a table of them on sample's device, the timestep's row)."""
        if (now := self._time(timestep)) is None:
            settings, sources = ("ddim", self._stride, self.config.prediction_type, eta), self._sources
            return self._rows(settings, sources, lambda: self._table(eta), sample), row_of(timestep, sample)
        then, alphas = now - self._stride, self._numbers(self.alphas_cumprod)
        alpha_prev = alphas[then] if then >= 0 else self._numbers(self.final_alpha_cumprod)
        sigma = 0.0
        if eta:
            sigma = self._kept(("sigma", self._stride, eta), self._sources, lambda: self._sigmas(eta))[now]
        return coefficients_of(alphas[now], alpha_prev, sigma, self.config.prediction_type), None

    @property
    def _stride(self) -> int:
        return self.config.num_train_timesteps // self.num_inference_steps

    @property
    def _sources(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.alphas_cumprod, self.final_alpha_cumprod

    def _sigmas(self, eta: float) -> list[float]:
        return [eta * variance**0.5 for variance in self._variances().tolist()]

    def _variances(self) -> torch.Tensor:
        """The parent's _get_variance for each time of the schedule: [T]."""
        alpha_t, alpha_prev = self.alphas_cumprod, self._later()
        return ((1 - alpha_prev) / (1 - alpha_t) * (1 - alpha_t / alpha_prev)).clamp(min=0)

    def _later(self) -> torch.Tensor:
        return before(self.alphas_cumprod, self._stride, self.final_alpha_cumprod)

    def _table(self, eta: float) -> torch.Tensor:
        """[T, 7] float64: the coefficients of a step from each time of the schedule."""
        alpha_t = self.alphas_cumprod.double()
        sigma = eta * self._variances().double().sqrt() if eta else torch.zeros_like(alpha_t)
        return coefficient_rows(alpha_t, self._later().double(), sigma, self.config.prediction_type)


def _noise(sample, model_output, generator, variance_noise) -> torch.Tensor:
    """The step's noise: given, or drawn as the parent draws it, so that a seed gives the same picture."""
    if variance_noise is None:
        return randn_tensor(sample.shape, generator=generator, device=model_output.device, dtype=model_output.dtype)
    if generator is not None:
        raise ValueError("both generator and variance_noise were given; give one")
    return variance_noise
