"""The seven coefficients of a DDIM update (csrc/ops.h: DdimCoefficients): numbers, or rows of a table."""

from __future__ import annotations

import functools
import math

import torch

from ldmfast.ops.dispatcher import Values, transformed

NAME = "ddim_step"
PREDICTIONS = ("epsilon", "v_prediction", "sample")


def number_on_host(value: float | torch.Tensor) -> float | None:
    """The value as a float, or None where it differs by sample, or reading it would need a device or lose a tangent."""
    if isinstance(value, torch.Tensor):
        readable = value.dim() == 0 and value.device.type == "cpu" and not value.requires_grad and not transformed()
        return value.item() if readable else None
    return float(value)


@functools.lru_cache(maxsize=4096)  # a sampler's steps come back with every picture
def coefficients_of(alpha_t: float, alpha_prev: float, sigma: float, prediction: str) -> tuple[float, ...]:
    for name, value in (("alpha_t", alpha_t), ("alpha_prev", alpha_prev)):
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{NAME}: {name} is {value}, expected a cumulative product in [0, 1]")
    if alpha_t == 0.0 and prediction == "epsilon":
        raise ValueError(f"{NAME}: alpha_t is 0, where epsilon does not determine x0; use v_prediction or sample")
    direction = 1.0 - alpha_prev - sigma * sigma
    if sigma < 0 or not direction >= -1e-6:
        raise ValueError(f"{NAME}: sigma is {sigma}, expected at most sqrt(1 - alpha_prev) = {(1 - alpha_prev) ** 0.5}")
    a, b = math.sqrt(alpha_t), math.sqrt(1.0 - alpha_t)
    x0_sample, x0_model, eps_sample, eps_model = _parametrisation(a, b, prediction)
    previous = math.sqrt(alpha_prev), math.sqrt(max(direction, 0.0))
    row = x0_sample, x0_model, eps_sample, eps_model, *previous, sigma
    return row if torch.compiler.is_compiling() else Values(row)


def _parametrisation(a, b, prediction):
    """x0 and eps as sums over (sample, model output), from sample = a x0 + b eps."""
    if prediction == "epsilon":
        return 1 / a, -b / a, 0 * a, 0 * a + 1
    if prediction == "v_prediction":  # v = a eps - b x0
        return a, -b, b, a
    return 0 * a, 0 * a + 1, _inverse(b), -a * _inverse(b)


def _inverse(b):
    """1 / b; 0 where b is 0, that is where the sample holds no noise to recover."""
    if isinstance(b, torch.Tensor):
        return torch.where(b > 0, 1 / b, torch.zeros_like(b))
    return 1 / b if b > 0 else 0.0


def coefficient_table(
    sample: torch.Tensor,
    alpha_t: float | torch.Tensor,
    alpha_prev: float | torch.Tensor,
    sigma: float | torch.Tensor,
    prediction: str,
) -> torch.Tensor:
    """The seven coefficients of each sample, [N, 7] float32, computed in float64 on sample's device."""
    N = sample.shape[0] if sample.dim() else 1
    columns = []
    for name, value in (("alpha_t", alpha_t), ("alpha_prev", alpha_prev), ("sigma", sigma)):
        if isinstance(value, torch.Tensor):
            value = value.to(sample.device, torch.float64)
        else:  # a fill, not a copy from the host, so that a CUDA graph can capture it
            value = torch.full((), value, dtype=torch.float64, device=sample.device)
        if value.dim() > 1 or value.dim() == 1 and value.shape[0] != N:
            raise ValueError(f"{NAME}: {name} has shape {list(value.shape)}, expected a scalar or [N] = [{N}]")
        columns.append(value.expand(N))
    table = coefficient_rows(*columns, prediction)
    return table if sample.dtype is torch.float64 else table.float()


def coefficient_rows(
    alpha_t: torch.Tensor, alpha_prev: torch.Tensor, sigma: torch.Tensor, prediction: str
) -> torch.Tensor:
    """`coefficients_of` without its checks for each number of [R] float64 tensors: [R, 7] float64, the same bits."""
    parts = _parametrisation(alpha_t.sqrt(), (1 - alpha_t).sqrt(), prediction)
    return torch.stack([*parts, alpha_prev.sqrt(), (1 - alpha_prev - sigma * sigma).clamp(min=0).sqrt(), sigma], dim=1)
