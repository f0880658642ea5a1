"""The denoising loop, one for every sampler, and what can be done between its steps."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import diffusers
import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput

from ldmfast.diffusion.guidance import guide


@torch.no_grad()
def sample(
    predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    scheduler: diffusers.SchedulerMixin,
    times: torch.Tensor,
    *,
    guidance: float | None = None,
    rescale: float = 0.0,
    eta: float = 0.0,
    generators: list[torch.Generator] | None = None,
    after: Callable[[torch.Tensor, int], torch.Tensor] | None = None,
    watch: Callable[[int, Callable[[], torch.Tensor]], None] | None = None,
    step: Callable[[torch.Tensor, torch.Tensor, int], SchedulerOutput | None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> torch.Tensor:
    """From the noisy x [N, ...] at times[0] to the clean sample [N, ...].

    predict     (x [N, ...], t) -> the model's output [N, ...], or [2N, ...], unconditional half first, with guidance
    scheduler   one of diffusers' interface, its timesteps set; ours combine the guidance in their own pass
    times       its timesteps, or the later ones (`begin_at`)
    guidance    scale of classifier-free guidance; None: none.    rescale  `guidance.guide`'s
    eta         how stochastic DDIM is, 0 to 1
    generators  N generators, one a picture, of the noise that a stochastic sampler adds
    after       (x, i) -> x, what to make of the sample after step i
    watch       (i, function that returns the predicted x0 [N, ...]), called after step i
    step        (x, t, i) -> the scheduler's result, with its x0, in place of predict, guidance and the scheduler's
                step; or None: they are to be called
    stop        asked after each step: true ends the run there, with the sample as it is

    Raises ValueError if the scheduler takes no eta.
    """
    takes = inspect.signature(scheduler.step).parameters
    fused = guidance is not None and not rescale and "guidance" in takes
    options = {"guidance": guidance} if fused else {}
    if "generator" in takes:
        options["generator"] = generators
    check_eta(scheduler, eta)
    if eta:
        options["eta"] = eta
    for i, t in enumerate(times):
        result, seen, output = step and step(x, t, i), None, None
        if result is None:
            seen = scheduler.scale_model_input(x, t)
            output = predict(seen, t)
            if guidance is not None and not fused:
                output = guide(output, guidance, rescale)
            result = scheduler.step(output, t, x, **options)
        x = result.prev_sample.to(x.dtype)
        if after:
            x = after(x, i)
        if watch:
            watch(i, lambda: _x0(scheduler, result, seen, output, t, guidance if fused else None))  # noqa: B023
        if stop and stop():
            break
    return x


def check_eta(scheduler: diffusers.SchedulerMixin, eta: float) -> None:
    """Raises ValueError if the scheduler takes no eta, and one is given."""
    if eta and "eta" not in inspect.signature(scheduler.step).parameters:
        raise ValueError(f"eta={eta}: {type(scheduler).__name__} takes none; eta belongs to ddim")


def _x0(scheduler, result, x, output, t, guidance):
    """The predicted clean sample: what the scheduler says, else from x and the output at the schedule's time t."""
    if (x0 := result.get("pred_original_sample")) is not None:
        return x0
    output = output if guidance is None else guide(output, guidance)
    kind = scheduler.config.get("prediction_type", "epsilon")
    if kind == "sample":
        return output
    alphas = scheduler.alphas_cumprod
    alpha = alphas[round(float(t))].item()  # Karras' times lie between the schedule's
    a, b = alpha**0.5, (1 - alpha) ** 0.5
    return a * x - b * output if kind == "v_prediction" else (x - b * output) / a


def begin_at(
    scheduler: diffusers.SchedulerMixin, steps: int, first: int, device: torch.device | str | None = None
) -> torch.Tensor:
    """The timesteps of `steps` steps without the first `first` of them, for img2img. Sets the scheduler's state.

    Schedulers of order 2 have two timesteps a step; PLMS does its first step twice, wherever it begins.
    """
    scheduler.set_timesteps(steps, device=device)
    times = scheduler.timesteps
    if not first:
        return times
    if getattr(scheduler.config, "skip_prk_steps", False) and len(times) > steps:
        plain = times[[0, *range(2, len(times))]][first:]
        return torch.cat([plain[:2], plain[1:]])
    first *= scheduler.order
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)
    return times[first:]


def starting_point(
    scheduler: diffusers.SchedulerMixin, times: torch.Tensor, noise: torch.Tensor, latents: torch.Tensor | None = None
) -> torch.Tensor:
    """x at times[0]: the noise at the scheduler's scale, or the latents [N, ...] with noise to that time's level."""
    if latents is None:
        return noise * scheduler.init_noise_sigma
    return scheduler.add_noise(latents, noise, times[:1])


def keep_known(
    scheduler: diffusers.SchedulerMixin,
    times: torch.Tensor,
    latents: torch.Tensor,
    noise: torch.Tensor,
    mask: torch.Tensor,
) -> Callable[[torch.Tensor, int], torch.Tensor]:
    """`after` for inpainting with any model: outside of the mask, the known latents at the next time's noise level.

    latents, noise [N, c, h, w]; mask [N, 1, h, w], 1 where to draw.
    Source: Lugmayr et al. 2022 (arXiv 2201.09865), formula 8, without the resampling.
    """

    def after(x, i):
        known = latents if i + 1 == len(times) else _noised(scheduler, latents, noise, times[i + 1])
        return torch.where(mask > 0, x, known)

    return after


def _noised(scheduler, latents, noise, t):
    """The latents with noise to the level of the step at t, which comes next."""
    if isinstance(scheduler, diffusers.KDPM2DiscreteScheduler) and not scheduler.state_in_first_order:
        # every other step stands between two levels, which its add_noise does not know of
        return latents + noise * scheduler.sigmas_interpol[scheduler.step_index].to(noise)
    return scheduler.add_noise(latents, noise, t[None])
