"""One DDIM update, with classifier-free guidance, in one pass over the latents."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ldmfast.ops import native, triton_backend
from ldmfast.ops.checks import require_device, require_float, require_shape, require_tensors, short
from ldmfast.ops.ddim_coefficients import NAME, PREDICTIONS, coefficient_table, coefficients_of, number_on_host
from ldmfast.ops.dispatcher import vmapped
from ldmfast.ops.operator import Op


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
    host = [number_on_host(value) for value in (alpha_t, alpha_prev, sigma)]
    if None not in host:
        coefficients, table = coefficients_of(*host, prediction), None
        if host[2] and noise is None:
            raise ValueError(f"{NAME}: noise is None, expected a tensor of sample's shape as sigma is {host[2]}")
    else:
        coefficients, table = [], coefficient_table(sample, alpha_t, alpha_prev, sigma, prediction)
        if noise is None and host[2] != 0:
            raise ValueError(f"{NAME}: noise is None, expected a tensor of sample's shape as sigma is a tensor")
    return sample, model_output, coefficients, table, guidance, noise, clip


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
    if sample.is_contiguous() or sample.dim() != 4 or vmapped():
        return torch.contiguous_format
    if sample.is_contiguous(memory_format=torch.channels_last):
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
