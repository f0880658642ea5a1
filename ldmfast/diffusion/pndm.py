"""`PNDMScheduler`: diffusers' PNDMScheduler, PLMS above all, whose update is one op."""

from __future__ import annotations

import diffusers
import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput

from ldmfast import ops
from ldmfast.diffusion.configuration import adopted, check_steps
from ldmfast.diffusion.guidance import guide

# Adams-Bashforth: what the newest, the one before it, ... count for, by how many outputs there are
MULTISTEP = {1: (1.0,), 2: (3 / 2, -1 / 2), 3: (23 / 12, -16 / 12, 5 / 12), 4: (55 / 24, -59 / 24, 37 / 24, -9 / 24)}


class PNDMScheduler(diffusers.PNDMScheduler):
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
        super().set_timesteps(num_inference_steps, device)

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
        if guidance is not None:  # here, and not in the op: the history keeps guided outputs, half as large
            model_output = guide(model_output, guidance)
        return super().step(model_output, timestep, sample, return_dict)

    def step_plms(
        self, model_output: torch.Tensor, timestep: int | torch.Tensor, sample: torch.Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple:
        """The update of `step` once there is no Runge-Kutta step left."""
        if self.num_inference_steps is None:
            raise ValueError("the number of steps is not set: call set_timesteps first")
        if not self.config.skip_prk_steps and len(self.ets) < 3:
            raise ValueError("step_plms without skip_prk_steps comes after 12 Runge-Kutta steps: call step")
        prediction = self.config.prediction_type
        if prediction == "v_prediction" and self.history == "epsilon":
            alpha_t = self.alphas_cumprod[int(timestep)].item()
            model_output, prediction = alpha_t**0.5 * model_output + (1 - alpha_t) ** 0.5 * sample, "epsilon"
        now, stride = int(timestep), self.config.num_train_timesteps // self.num_inference_steps
        if self.counter == 1:  # the first step again, from where it began, with the mean of the slopes at both ends
            model_output, sample = (model_output + self.ets[-1]) / 2, self.cur_sample
            now, self.cur_sample = now + stride, None
        else:
            self.ets = [*self.ets[-3:], model_output]
            self.cur_sample = sample if self.counter == 0 else self.cur_sample
            model_output = _multistep(self.ets)
        before = now - stride
        alpha_prev = self.alphas_cumprod[before] if before >= 0 else self.final_alpha_cumprod
        prev, x0 = ops.ddim_step(
            sample, model_output, self.alphas_cumprod[now].item(), alpha_prev.item(), prediction=prediction
        )
        self.counter += 1
        return SchedulerOutput(prev_sample=prev) if return_dict else (prev,)


def _multistep(outputs: list[torch.Tensor]) -> torch.Tensor:
    weights = MULTISTEP[len(outputs)]
    total = outputs[-1] * weights[0] if len(weights) > 1 else outputs[-1]
    for weight, output in zip(weights[1:], reversed(outputs[:-1]), strict=True):
        total = torch.add(total, output, alpha=weight)
    return total
