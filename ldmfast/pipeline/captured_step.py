"""A whole step of sampling, the U-Net with guidance and DDIM's update, as one graph: see ldmfast/models/graph/."""

from __future__ import annotations

from collections.abc import Callable

import diffusers
import torch
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from torch import nn

from ldmfast import ops
from ldmfast.conditioning.condition import Condition
from ldmfast.diffusion.ddim import DDIMScheduler
from ldmfast.ops.ddim_coefficients import coefficients_of

Step = Callable[[torch.Tensor, torch.Tensor, int], DDIMSchedulerOutput | None]


def captured_step(
    unet: nn.Module,
    scheduler: diffusers.SchedulerMixin,
    times: torch.Tensor,
    condition: Condition,
    *,
    guidance: float | None,
    rescale: float = 0.0,
    eta: float = 0.0,
) -> Step | None:
    """(x [N, ...], t, i) -> the result of the scheduler's step i, at times[i], from one graph.

    condition  of [N] pictures, with guidance of [2N], the unconditional ones first
    The function gives None where only the U-Net's call is to be a graph: while it has hooks, which belong around it.
    None in its place while graph mode is off, and for an update that is no function of x, the output and the time
    alone: another sampler's, which keeps its past outputs or draws noise.
    """
    if getattr(unet, "graphs", None) is None or type(scheduler) is not DDIMScheduler or rescale or eta:
        return None
    if scheduler.config.thresholding:
        return None
    clip = scheduler.config.clip_sample_range if scheduler.config.clip_sample else None
    rows = _rows(scheduler, times)  # [steps, 7]: one copy to the device for all steps

    def over_buffers(x, t, row, parts):
        output = _predicted(unet, x, t, Condition(**parts), guidance)
        return _updated(x, output, row, guidance, clip)

    def step(x: torch.Tensor, t: torch.Tensor, i: int) -> DDIMSchedulerOutput | None:
        graphs = unet.graphs
        if graphs is None or unet._forward_hooks or unet._forward_pre_hooks:
            return None

        def as_it_is():
            return scheduler.step(_predicted(unet, x, t, condition, guidance), t, x, guidance=guidance).to_tuple()

        arguments = {"x": x, "t": t.to(x.device), "row": rows[i].expand(len(x), -1), "parts": condition.parts()}
        settings = guidance, clip
        found = graphs.call(unet, "ddim step", over_buffers, arguments, as_it_is, x.device, settings=settings)
        return DDIMSchedulerOutput(*found)

    return step


def _predicted(unet, x, t, condition, guidance):
    return condition.predict(unet, x if guidance is None else torch.cat([x, x]), t)


def _updated(x, output, row, guidance, clip):
    """ops.ddim_step with the coefficients [N, 7] of each sample in memory, where a graph reads them."""
    arguments = list(ops.ddim_step.op.normalise(x, output, 1.0, 1.0, guidance=guidance, clip=clip))
    arguments[2:4] = (), row  # the table, in place of the numbers that the alphas gave
    return ops.ddim_step.op(*arguments, None)


def _rows(scheduler, times):
    """The coefficients of the update at each of `times`: [steps, 7] float32, on their device."""
    alphas, last = scheduler.alphas_cumprod.tolist(), scheduler.final_alpha_cumprod.item()
    stride = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    kind = scheduler.config.prediction_type
    rows = [coefficients_of(alphas[t], alphas[t - stride] if t >= stride else last, 0.0, kind) for t in times.tolist()]
    return torch.tensor(rows, dtype=torch.float32).to(times.device)
