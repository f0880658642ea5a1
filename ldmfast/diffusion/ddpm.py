"""`DDPMScheduler`: diffusers' DDPMScheduler, ancestral sampling, whose step is one op."""

from __future__ import annotations

import math

import diffusers
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor

from ldmfast import ops
from ldmfast.diffusion.configuration import adopted, check_steps
from ldmfast.diffusion.guidance import guide
from ldmfast.diffusion.step_tables import StepTables, place_of, row_of
from ldmfast.ops.ddim_coefficients import coefficient_rows, coefficients_of


class DDPMScheduler(StepTables, diffusers.DDPMScheduler):
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
        with torch.inference_mode(False):
            super().set_timesteps(num_inference_steps, None, timesteps)
            times = self.timesteps
            self.timesteps = times.to(device)
        self._note_numbers(self.timesteps, times.tolist())
        self._prepare(device)

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
        noise = None
        if self._is_noisy(timestep):
            noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)
        table, row = self._coefficients(timestep, sample)
        prev, x0 = ops.ddim_step(sample, model_output, table=table, row=row, guidance=guidance, noise=noise)
        return DDPMSchedulerOutput(prev_sample=prev, pred_original_sample=x0) if return_dict else (prev, x0)

    def _is_noisy(self, timestep: int | torch.Tensor) -> bool:
        """Whether the step adds noise: also where the timestep is on a device, and none of the timesteps themselves."""
        now = self._time(timestep)
        if now is None and timestep.is_cuda and (place := place_of(timestep, self.timesteps)) is not None:
            now = self._times()[place]
        return now is None or now > 0

    def _coefficients(self, timestep: int | torch.Tensor, sample: torch.Tensor) -> tuple:
        """(the step's coefficients, None), or (a table of them on sample's device, the timestep's row)."""
        settings = "ddpm", self.num_inference_steps, self.custom_timesteps, self.config.prediction_type
        sources = self.alphas_cumprod, self.timesteps
        if (now := self._time(timestep)) is None:
            return self._rows(settings, sources, self._table, sample), row_of(timestep, sample)
        following = self._kept(settings, sources, self._before)
        before = following[now] if 0 <= now < len(following) else None
        if before is None:
            raise IndexError(f"timestep {now} is none of the scheduler's timesteps")
        alphas = self._numbers(self.alphas_cumprod)
        alpha_t, alpha_prev = alphas[now], alphas[before] if before >= 0 else 1.0
        variance = max((1 - alpha_prev) / (1 - alpha_t) * (1 - alpha_t / alpha_prev), 0.0)
        return coefficients_of(alpha_t, alpha_prev, variance**0.5, self.config.prediction_type), None

    def _before(self) -> list[int | None]:
        """The time after a step from each time of the schedule: below 0 at its end, None for what is no timestep."""
        T = len(self.alphas_cumprod)
        if not (self.custom_timesteps or self.num_inference_steps):
            return list(range(-1, T - 1))
        found, times = [None] * T, self._times()
        for now, before in reversed(list(zip(times, [*times[1:], -1], strict=True))):
            found[now] = before  # the first one, where a time comes twice
        return found

    def _table(self) -> torch.Tensor:
        """[T, 7] float64: the coefficients of a step from each timestep; NaN for what is none."""
        alpha_t, before = self.alphas_cumprod.double(), self._before()
        index = torch.tensor([max(b or 0, 0) for b in before], device="cpu").to(alpha_t.device, non_blocking=True)
        kind = torch.tensor([math.nan if b is None else float(b < 0) for b in before], device="cpu").double()
        kind = kind.to(alpha_t.device, non_blocking=True)  # 1 at the end, where nothing is left of the noise
        alpha_prev = alpha_t[index] * (1 - kind) + kind
        variance = ((1 - alpha_prev) / (1 - alpha_t) * (1 - alpha_t / alpha_prev)).clamp(min=0)
        return coefficient_rows(alpha_t, alpha_prev, variance.sqrt(), self.config.prediction_type)
