"""`PNDMScheduler`: diffusers' PNDMScheduler, PLMS above all, whose update is one op."""

from __future__ import annotations

import diffusers
import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput

from ldmfast import ops
from ldmfast.diffusion.configuration import adopted, check_steps
from ldmfast.diffusion.guidance import guide
from ldmfast.diffusion.step_tables import StepTables, before, row_of
from ldmfast.ops.ddim_coefficients import coefficient_rows

# Adams-Bashforth: what the newest, the one before it, ... count for, by how many outputs there are
MULTISTEP = {1: (1.0,), 2: (3 / 2, -1 / 2), 3: (23 / 12, -16 / 12, 5 / 12), 4: (55 / 24, -59 / 24, 37 / 24, -9 / 24)}


class PNDMScheduler(StepTables, diffusers.PNDMScheduler):
    """Constructed, configured, loaded and saved as diffusers' PNDMScheduler is. `step` also takes `guidance`.

    With skip_prk_steps it is PLMS: the DDIM update (eta 0) of a linear multistep prediction, the first step being
    done twice, as Heun does it. The Runge-Kutta steps of PNDM proper run as the parent's.
        e' = (55 e[t] - 59 e[t+1] + 37 e[t+2] - 9 e[t+3]) / 24      fewer terms while there are fewer outputs
        x0 = (x - sqrt(1 - a) e') / sqrt(a)                         a, b: the cumulative products at t and before it
        x  = sqrt(b) x0 + sqrt(1 - b) e'
        after the first step only: back to its x, with the mean of e and of the output at the new x

    history  what the steps of a model that predicts v are extrapolated in. "epsilon", as Stable Diffusion 2's own code
             does; "v_prediction" mixes the outputs as they are, as diffusers does.
    Source: Liu et al. 2022 (arXiv 2202.09778), formula 12; the sampler of Rombach et al. 2022's released code.
    """

    # the shipped model, unguided, distance from 25 steps of Heun: epsilon 0.016 and 0.015 at 10 and 20 steps, v 0.131
    # and 0.072, DDIM 0.055 and 0.024
    history = "epsilon"
    stock = diffusers.PNDMScheduler

    @classmethod
    def adopt(cls, scheduler: diffusers.PNDMScheduler) -> PNDMScheduler:
        """Ours of the same configuration, which extrapolates as diffusers does: the same pictures."""
        new = adopted(cls, scheduler)
        new.history = new.config.prediction_type
        return new

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """As the parent does. Raises ValueError for less than one step."""
        check_steps(num_inference_steps)
        with torch.inference_mode(False):
            super().set_timesteps(num_inference_steps, device)
        self._prepare(device, False)
        self._prepare(device, True)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        return_dict: bool = True,
        *,
        guidance: float | None = None,
    ) -> SchedulerOutput | tuple:
        """x_t [N, ...] to x_{t-1}. With `guidance`, model_output is [2N, ...], the unconditional half first.

        Called once for each of `timesteps` in their order. Raises ValueError before set_timesteps.
        """
        if self.config.skip_prk_steps or self.counter >= len(self.prk_timesteps):
            return self.step_plms(model_output, timestep, sample, return_dict, guidance=guidance)
        combined = model_output if guidance is None else guide(model_output, guidance)
        return super().step(combined, timestep, sample, return_dict)

    def step_plms(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        return_dict: bool = True,
        *,
        guidance: float | None = None,
    ) -> SchedulerOutput | tuple:
        """The update of `step` once there is no Runge-Kutta step left."""
        if self.num_inference_steps is None:
            raise ValueError("the number of steps is not set: call set_timesteps first")
        if not self.config.skip_prk_steps and len(self.ets) < 3:
            raise ValueError("step_plms without skip_prk_steps comes after 12 Runge-Kutta steps: call step")
        again = self.counter == 1  # the first step again, from where it began, with the mean of the slopes at both ends
        history = self.ets[-1:] if again else self.ets[:-4:-1]
        weights = (0.5, 0.5) if again else MULTISTEP[len(history) + 1]
        table, row = self._coefficients(timestep, again, sample)
        # what is left of the sample that the step begins at stands in the noise's place
        begin = self.cur_sample if again else sample
        prev, output = ops.ddim_step(
            sample, model_output, table=table, row=row, guidance=guidance, noise=begin, weights=weights, history=history
        )
        if again:
            self.cur_sample = None
        else:
            self.ets = [*self.ets[-3:], output]
            self.cur_sample = sample if self.counter == 0 else self.cur_sample
        self.counter += 1
        return SchedulerOutput(prev_sample=prev) if return_dict else (prev,)

    def _coefficients(self, timestep: int | torch.Tensor, again: bool, sample: torch.Tensor) -> tuple:
        """(the step's coefficients, None), or (a table of them on sample's device, the timestep's row)."""
        stride = self.config.num_train_timesteps // self.num_inference_steps
        settings = "plms", stride, self.config.prediction_type, self.history, again
        sources = self.alphas_cumprod, self.final_alpha_cumprod

        def make():
            return self._table(stride, again)

        if (now := self._time(timestep)) is None:
            return self._rows(settings, sources, make, sample), row_of(timestep, sample)
        coefficients = self._kept(settings, sources, lambda: make().tolist())[now]
        if coefficients[6] != coefficients[6]:
            raise IndexError(f"timestep {now} has none before it to do again")
        return coefficients, None

    def _table(self, stride: int, again: bool) -> torch.Tensor:
        """[T, 7] float64: what `ops.ddim_step` takes for a multistep step from each time of the schedule.

        again  the first step once more: from `stride` times later to this one
        """
        alphas, final = self.alphas_cumprod, self.final_alpha_cumprod
        kind, T, zero = self.config.prediction_type, len(alphas), torch.zeros_like(alphas).double()
        alpha, (a, b) = alphas.double(), (alphas.double().sqrt(), (1 - alphas.double()).sqrt())
        sample, model = (b, a) if kind == "v_prediction" and self.history == "epsilon" else (zero, zero + 1)
        if kind == "v_prediction" and self.history == "epsilon":
            kind = "epsilon"
        begin = torch.cat([alpha[stride:], torch.full_like(alpha[:stride], torch.nan)])[:T] if again else alpha
        end = alpha if again else before(alphas, stride, final).double()
        x0_x, x0_m, eps_x, eps_m, prev_x0, prev_eps, _ = coefficient_rows(begin, end, zero, kind).unbind(1)
        of_sample, of_output = prev_x0 * x0_x + prev_eps * eps_x, prev_x0 * x0_m + prev_eps * eps_m
        return torch.stack([zero, zero, sample, model, zero, of_output, of_sample], dim=1)
