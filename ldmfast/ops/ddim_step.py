"""One DDIM update, with classifier-free guidance, in one pass over the latents."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ldmfast.ops import native, triton_backend
from ldmfast.ops.checks import require_device, require_float, require_shape, require_tensors, short
from ldmfast.ops.operator import Op

NAME = "ddim_step"
PREDICTIONS = ("epsilon", "v_prediction", "sample")


def ddim_step(
    sample: torch.Tensor,
    model_output: torch.Tensor,
    alpha_t: float | torch.Tensor,
    alpha_prev: float | torch.Tensor,
    *,
    guidance: float | None = None,
    sigma: float | torch.Tensor = 0.0,
    noise: torch.Tensor | None = None,
    prediction: str = "epsilon",
    clip: float | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x_{t-1} from x_t and the model's output.

    sample        [N, ...]   float16 | bfloat16 | float32 (float64: the reference)
    model_output  [N, ...], or with guidance [2N, ...], the unconditional half first; dtype of sample, or another
                  floating type that is converted
    alpha_t, alpha_prev      cumulative products of 1 - beta in [0, 1]: floats, 0-d, or [N]
    guidance      s in  u + s (c - u), combined in float32 in the same pass; None: model_output is used as it is
    sigma         standard deviation of the noise added: float, 0-d or [N]; it needs `noise`  [N, ...]
    prediction    what the model predicts: "epsilon", "v_prediction" or "sample"
    clip          x0 is clamped to [-clip, clip]; None: not
    returns       (previous sample, predicted x0), shape, dtype and layout of sample

    Coefficients are float64, tensor maths float32. Numbers and 0-d CPU tensors are read on the host; tensors on a GPU
    are not (no synchronisation), so a CUDA graph can be replayed with other values.

    Raises TypeError for what is no tensor; ValueError naming the argument for a wrong shape, dtype, device or value, or
    an unknown backend; NotImplementedError with the reason of each backend that refuses.
    Traffic: 4 * sample bytes, 5 with guidance.
    Source: Song et al. 2021 (arXiv 2010.02502), equation 12; Salimans & Ho 2022 (arXiv 2202.00512) for v.
    """
    arguments = _arguments(
        sample,
        model_output,
        alpha_t,
        alpha_prev,
        guidance=guidance,
        sigma=sigma,
        noise=noise,
        prediction=prediction,
        clip=clip,
    )
    return op(*arguments, backend)


def _arguments(
    sample, model_output, alpha_t, alpha_prev, *, guidance=None, sigma=0.0, noise=None, prediction="epsilon", clip=None
):
    require_tensors(NAME, sample=sample, model_output=model_output, noise_=noise)
    if prediction not in PREDICTIONS:
        raise ValueError(f"{NAME}: prediction is {prediction!r}, expected {', '.join(PREDICTIONS)}")
    host = [_host(value) for value in (alpha_t, alpha_prev, sigma)]
    if None not in host:
        coefficients, table = _coefficients(*host, prediction), None
        if host[2] and noise is None:
            raise ValueError(f"{NAME}: noise is None, expected a tensor of sample's shape as sigma is {host[2]}")
    else:
        coefficients, table = [], _table(sample, alpha_t, alpha_prev, sigma, prediction)
        if noise is None and host[2] != 0:
            raise ValueError(f"{NAME}: noise is None, expected a tensor of sample's shape as sigma is a tensor")
    return sample, model_output, coefficients, table, guidance, noise, clip


def _host(value) -> float | None:
    """The value as a float, or None where reading it would need a device or it differs by sample."""
    if isinstance(value, torch.Tensor):
        return value.item() if value.dim() == 0 and value.device.type == "cpu" and not value.requires_grad else None
    return float(value)


def _coefficients(alpha_t: float, alpha_prev: float, sigma: float, prediction: str) -> list[float]:
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
    return [x0_sample, x0_model, eps_sample, eps_model, math.sqrt(alpha_prev), math.sqrt(max(direction, 0.0)), sigma]


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


def _table(sample, alpha_t, alpha_prev, sigma, prediction) -> torch.Tensor:
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
    alpha_t, alpha_prev, sigma = columns
    parts = _parametrisation(alpha_t.sqrt(), (1 - alpha_t).sqrt(), prediction)
    table = torch.stack([*parts, alpha_prev.sqrt(), (1 - alpha_prev - sigma * sigma).clamp(min=0).sqrt(), sigma], dim=1)
    return table if sample.dtype is torch.float64 else table.float()


def check(
    sample: torch.Tensor,
    model_output: torch.Tensor,
    coefficients: Sequence[float],
    table: torch.Tensor | None,
    guidance: float | None,
    noise: torch.Tensor | None,
    clip: float | None,
) -> None:
    if sample.dim() == 0:
        raise ValueError(f"{NAME}: sample has shape [], expected [N, ...]")
    require_float(NAME, "sample", sample)
    for name, tensor in (("model_output", model_output), ("noise", noise)):
        if tensor is not None and not tensor.dtype.is_floating_point:
            raise ValueError(f"{NAME}: {name} is {short(tensor.dtype)}, expected a floating type")
    require_device(NAME, "sample", sample.device, model_output=model_output, noise=noise, table=table)
    N, *rest = sample.shape
    if guidance is None:
        require_shape(NAME, "model_output", model_output, (N, *rest), "sample's shape")
    else:
        if not math.isfinite(guidance):
            raise ValueError(f"{NAME}: guidance is {guidance}, expected a finite number")
        require_shape(NAME, "model_output", model_output, (2 * N, *rest), "with guidance, [2N, ...]")
    require_shape(NAME, "noise", noise, (N, *rest), "sample's shape")
    require_shape(NAME, "table", table, (N, 7), "[N, 7]")
    if table is None and len(coefficients) != 7:
        raise ValueError(f"{NAME}: coefficients has {len(coefficients)} values, expected 7, or a table")
    if clip is not None and not clip > 0:
        raise ValueError(f"{NAME}: clip is {clip}, expected more than 0")


def memory_layout(sample: torch.Tensor) -> torch.memory_format:
    if not sample.is_contiguous() and sample.dim() == 4 and sample.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def empty_output(sample: torch.Tensor) -> torch.Tensor:
    if sample.is_contiguous():
        return torch.empty_like(sample)
    return torch.empty_like(sample, memory_format=memory_layout(sample))


def _fake(sample, *others):
    return empty_output(sample), empty_output(sample)


def _example(dtype, device):
    """A latent of 512x512 pixels, with guidance."""
    generator = torch.Generator().manual_seed(0)
    sample, output = (torch.randn(N, 4, 64, 64, generator=generator).to(device, dtype) for N in (1, 2))
    return _arguments(sample, output, 0.3, 0.5, guidance=7.5)


def _autocast(dtype, *args):
    return args  # latents keep their dtype


op = Op(
    NAME,
    "(Tensor sample, Tensor model_output, float[] coefficients, Tensor? table, float? guidance, Tensor? noise, "
    "float? clip) -> (Tensor, Tensor)",
    check=check,
    fake=_fake,
    autocast=_autocast,
    normalise=_arguments,
    example=_example,
)
ddim_step.op = op


@op.backend("torch")
def _reference(sample, model_output, coefficients, table, guidance, noise, clip):
    dtype = torch.float64 if sample.dtype is torch.float64 else torch.float32
    x, m = sample.to(dtype), model_output.to(dtype)
    if table is not None:
        coefficients = table.to(dtype).reshape(-1, 7, *[1] * (x.dim() - 1)).unbind(1)
    x0_x, x0_m, eps_x, eps_m, prev_x0, prev_eps, sigma = coefficients
    if guidance is not None:
        unconditional, conditional = m.chunk(2)
        m = unconditional + guidance * (conditional - unconditional)
    x0 = x0_x * x + x0_m * m
    if clip is not None:
        x0 = x0.clamp(-clip, clip)
    prev = prev_x0 * x0 + prev_eps * (eps_x * x + eps_m * m)
    if noise is not None:
        prev = prev + sigma * noise.to(dtype)
    return tuple(value.to(sample.dtype).contiguous(memory_format=memory_layout(sample)) for value in (prev, x0))


def dense(sample: torch.Tensor, *others: torch.Tensor | None) -> Sequence[torch.Tensor | None]:
    """Every tensor dense in sample's layout and dtype, so that one index serves all."""
    if all(value is None or value.dtype is sample.dtype and value.is_contiguous() for value in (sample, *others)):
        return sample, *others  # the usual case, without a call into torch
    return [
        None if value is None else value.to(sample.dtype).contiguous(memory_format=memory_layout(sample))
        for value in (sample, *others)
    ]


def _native(extension, sample, model_output, coefficients, table, guidance, noise, clip):
    prev, x0 = empty_output(sample), empty_output(sample)
    if prev.numel():
        sample, model_output, noise = dense(sample, model_output, noise)
        fields = native_fields(sample, model_output, coefficients, table, guidance, clip)
        extension.ddim_step({"noise": noise, "prev": prev, "x0": x0, **fields}, *native.place(sample))
    return prev, x0


def native_fields(
    sample: torch.Tensor,
    model_output: torch.Tensor,
    coefficients: Sequence[float],
    table: torch.Tensor | None,
    guidance: float | None,
    clip: float | None,
) -> dict:
    """DdimStepArgs of csrc/ops.h but for noise, prev and x0; the gradient's struct has these fields, too."""
    N = sample.shape[0]
    return {
        "sample": sample,
        "model_output": model_output,
        "N": N,
        "M": sample.numel() // N,
        "coefficients": coefficients if table is None else (0.0,) * 7,
        "table": None if table is None else table.contiguous(),
        "guided": guidance is not None,
        "guidance": guidance or 0.0,
        "clipped": clip is not None,
        "clip": clip or 0.0,
        "dtype": native.DTYPES[sample.dtype],
    }


native.register(op, _native)


def _triton(kernel, sample, model_output, coefficients, table, guidance, noise, clip):
    prev, x0 = empty_output(sample), empty_output(sample)
    if prev.numel():
        sample, model_output, noise = dense(sample, model_output, noise)
        table = None if table is None else table.contiguous()
        kernel(sample, model_output, noise, prev, x0, coefficients, table, guidance, clip)
    return prev, x0


triton_backend.register(op, _triton)
