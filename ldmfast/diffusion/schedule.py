"""The noise schedule: how much of the picture is left at each of the training steps."""

from __future__ import annotations

import torch

from ldmfast.diffusion.ddim import DDIMScheduler

STEPS = 1000


def alphas_cumprod(beta_start: float, beta_end: float, steps: int = STEPS) -> torch.Tensor:
    """Cumulative products of 1 - beta, float64 [steps]; betas are linear in square-root space.

    Source: Rombach et al. 2022, the released configurations ("linear" there, "scaled_linear" in diffusers).
    """
    if not 0 < beta_start <= beta_end < 1:
        raise ValueError(f"betas must satisfy 0 < beta_start <= beta_end < 1, got {beta_start} and {beta_end}")
    betas = torch.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, dim=0)


def make_scheduler(
    beta_start: float, beta_end: float, prediction: str = "epsilon", steps: int = STEPS
) -> DDIMScheduler:
    """The DDIM sampler of that schedule: deterministic, unclipped, beginning at the last training step."""
    return DDIMScheduler(
        num_train_timesteps=steps,
        beta_start=beta_start,
        beta_end=beta_end,
        beta_schedule="scaled_linear",
        prediction_type=prediction,
        clip_sample=False,
        set_alpha_to_one=True,
        timestep_spacing="trailing",
        steps_offset=1,
    )
