"""Noise schedules, objectives and samplers. Loaded on first use."""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "DDIMScheduler": "ldmfast.diffusion.ddim",
    "DDPMScheduler": "ldmfast.diffusion.ddpm",
    "PNDMScheduler": "ldmfast.diffusion.pndm",
    "SAMPLERS": "ldmfast.diffusion.samplers",
    "add_noise": "ldmfast.diffusion.loss",
    "alphas_cumprod": "ldmfast.diffusion.schedule",
    "denoising_loss": "ldmfast.diffusion.loss",
    "make_sampler": "ldmfast.diffusion.samplers",
    "make_scheduler": "ldmfast.diffusion.schedule",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
