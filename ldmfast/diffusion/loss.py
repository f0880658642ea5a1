"""The denoising objective: E || target - model(x_t, t, c) ||^2, the target being the noise unless asked otherwise."""

from __future__ import annotations

import torch


def _per_sample(values, like):
    return values.to(like.device, like.dtype).view(-1, *[1] * (like.ndim - 1))


def add_noise(x0: torch.Tensor, noise: torch.Tensor, alpha_t: torch.Tensor) -> torch.Tensor:
    """x_t = sqrt(alpha_t) x0 + sqrt(1 - alpha_t) noise.   x0, noise [N, ...]; alpha_t [N] cumulative products"""
    return _per_sample(alpha_t.sqrt(), x0) * x0 + _per_sample((1 - alpha_t).sqrt(), x0) * noise


def target(x0: torch.Tensor, noise: torch.Tensor, alpha_t: torch.Tensor, prediction: str) -> torch.Tensor:
    """What the network is to predict, [N, ...].   v is Salimans & Ho 2022, appendix D."""
    if prediction == "epsilon":
        return noise
    if prediction == "sample":
        return x0
    if prediction == "v_prediction":
        return _per_sample(alpha_t.sqrt(), x0) * noise - _per_sample((1 - alpha_t).sqrt(), x0) * x0
    raise ValueError(f"prediction={prediction!r} is none of epsilon, v_prediction, sample")


def snr_weight(alpha_t: torch.Tensor, prediction: str, gamma: float) -> torch.Tensor:
    """Min-SNR-gamma weights [N]; gamma 0 gives ones.   Source: Hang et al. 2023 (arXiv 2303.09556), section 3.4."""
    if not gamma:
        return torch.ones_like(alpha_t)
    snr = alpha_t / (1 - alpha_t)
    weight = snr.clamp_max(gamma)  # of the loss on x0; the other targets scale it
    return {"sample": weight, "epsilon": weight / snr, "v_prediction": weight / (snr + 1)}[prediction]


def denoising_loss(
    predicted: torch.Tensor,
    x0: torch.Tensor,
    noise: torch.Tensor,
    alpha_t: torch.Tensor,
    *,
    prediction: str = "epsilon",
    gamma: float = 0.0,
) -> torch.Tensor:
    """Weighted mean squared error, a float32 scalar.   predicted, x0, noise [N, ...]; alpha_t [N]"""
    error = (predicted.float() - target(x0, noise, alpha_t, prediction).float()).pow(2)
    return (snr_weight(alpha_t, prediction, gamma).float() * error.flatten(1).mean(dim=1)).mean()
