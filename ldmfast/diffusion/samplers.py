"""Samplers by name, all for the noise schedule of one model.

`ddim`, `ddpm` and `plms` are ours, which step by one op, with guidance in the same pass; the others are diffusers'.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

# name -> diffusers' class, and what of its configuration the name stands for
SAMPLERS = {
    "ddim": ("DDIMScheduler", {}),  # Song et al. 2020
    "ddpm": ("DDPMScheduler", {}),  # Ho et al. 2020
    "plms": ("PNDMScheduler", {"skip_prk_steps": True}),  # Liu et al. 2022
    "dpm++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),  # Lu et al. 2022, order 2
    "dpm++-karras": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "use_karras_sigmas": True}),
    "dpm++-sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "dpm++-single": ("DPMSolverSinglestepScheduler", {"algorithm_type": "dpmsolver++", "lower_order_final": True}),
    "dpm2": ("KDPM2DiscreteScheduler", {}),  # Karras et al. 2022, algorithm 2, of DPM-Solver-2
    "dpm2-a": ("KDPM2AncestralDiscreteScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),  # Karras et al. 2022, algorithm 2 without its correction
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),  # Karras et al. 2022, algorithm 1
    "deis": ("DEISMultistepScheduler", {}),  # Zhang & Chen 2022
    "unipc": ("UniPCMultistepScheduler", {}),  # Zhao et al. 2023
}


def make_sampler(sampler: str | type | SchedulerMixin | None, scheduler: SchedulerMixin) -> SchedulerMixin:
    """The sampler to run a model with whose noise schedule `scheduler` (a diffusers scheduler) describes.

    sampler  None: `scheduler` itself; a name of SAMPLERS; a class of diffusers' schedulers; a scheduler, used as it is
    Raises ValueError for an unknown name, or a sampler that does not know a zero terminal SNR that the model needs.
    """
    if sampler is None:
        return scheduler
    if not isinstance(sampler, str | type):
        return sampler
    if isinstance(sampler, str):
        if sampler not in SAMPLERS:
            raise ValueError(f"sampler={sampler!r} is none of {', '.join(SAMPLERS)}")
        from ldmfast.diffusion import catalogue  # here, so that the names above can be listed without torch

        name, settings = SAMPLERS[sampler]
        kind = catalogue.scheduler(name)
    else:
        kind, settings = sampler, {}
    known = inspect.signature(kind.__init__).parameters
    if scheduler.config.get("rescale_betas_zero_snr") and "rescale_betas_zero_snr" not in known:
        raise ValueError(f"{kind.__name__} has no rescale_betas_zero_snr, which this model was trained with; use ddim")
    if "clip_sample" in known:  # diffusers' default clips, which is for pixels; latents go beyond 1
        settings = {"clip_sample": scheduler.config.get("clip_sample", False), **settings}
    return kind.from_config(scheduler.config, **settings)
