"""One DDIM update, with classifier-free guidance, in one pass over the latents."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch

from ldmfast.ops import native, speeds, triton_backend
from ldmfast.ops.checks import require_device, require_dtype, require_float, require_shape, require_tensors, short
from ldmfast.ops.ddim_coefficients import NAME, PREDICTIONS, coefficient_table, coefficients_of, number_on_host
from ldmfast.ops.dispatcher import Values, vmapped
from ldmfast.ops.operator import Op


def ddim_step(
    sample: torch.Tensor,
    model_output: torch.Tensor,
    alpha_t: float | torch.Tensor | None = None,
    alpha_prev: float | torch.Tensor | None = None,
    *,
    guidance: float | None = None,
    sigma: float | torch.Tensor = 0.0,
    noise: torch.Tensor | None = None,
    prediction: str = "epsilon",
    clip: float | None = None,
    table: Sequence[float] | torch.Tensor | None = None,
    row: torch.Tensor | None = None,
    weights: Sequence[float] = (),
    history: Sequence[torch.Tensor] = (),
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
    table         the seven coefficients of csrc/ops.h, in place of the alphas, sigma and prediction: numbers, or
                  [rows, 7] float32 (float64 beside a float64 sample): a row for each sample, or with
    row           [1] or [N], int64, on sample's device: the row of each. One that the table has not gives NaN.
    weights, history         of a linear multistep method: what the output of the model (which is guided, and made
                  x * eps_sample + output * eps_model first) counts for, and each of `history`, up to three [N, ...].
                  That sum e takes part as  x0 = x * x0_sample + e * x0_model,  prev = x0 * prev_x0 + e * prev_eps.
                  The second result is then what joins the history, in place of x0
    returns       (previous sample, predicted x0), shape, dtype and layout of sample

    Coefficients are float64, tensor maths float32. Numbers and 0-d CPU tensors are read on the host; tensors on a GPU
    are not (no synchronisation), so a CUDA graph can be replayed with other values.

    Raises TypeError for what is no tensor; ValueError naming the argument for a wrong shape, dtype, device or value, or
    an unknown backend; NotImplementedError with the reason of each backend that refuses.
    Traffic: 4 * sample bytes, 5 with guidance, 1 more for each of `history`.
    Source: Song et al. 2021 (arXiv 2010.02502), equation 12; Salimans & Ho 2022 (arXiv 2202.00512) for v.
    """
    first = _arguments(
        sample,
        model_output,
        alpha_t,
        alpha_prev,
        guidance,
        sigma,
        noise,
        prediction,
        clip,
        table,
        row,
        weights,
        history,
    )
    return op(*first, backend)


_NONE = Values()


def _in_the_table() -> tuple:
    """The coefficients where a table has them: of the kind that Op would make of them, but where that is traced."""
    return () if torch.compiler.is_compiling() else _NONE


@functools.lru_cache(maxsize=4096)
def _values_of(*numbers_and_prediction) -> Values:
    """The coefficients as Op would make them of a tuple at each call."""
    return Values(coefficients_of(*numbers_and_prediction))


def _arguments(
    sample,
    model_output,
    alpha_t=None,
    alpha_prev=None,
    guidance=None,
    sigma=0.0,
    noise=None,
    prediction="epsilon",
    clip=None,
    table=None,
    row=None,
    weights=(),
    history=(),
):
    if table is None:
        coefficients, table = _of_alphas(sample, alpha_t, alpha_prev, sigma, prediction, noise)
    else:
        if alpha_t is not None or alpha_prev is not None:
            raise ValueError(f"{NAME}: alphas are given beside a table, expected one of them")
        coefficients, table = (_in_the_table(), table) if isinstance(table, torch.Tensor) else (table, None)
        if noise is None and coefficients and any(coefficients[6:]):
            raise ValueError(
                f"{NAME}: noise is None, expected a tensor of sample's shape as sigma is {coefficients[6]}"
            )
    if history and not len(weights) - 1 == len(history) <= 3:
        raise ValueError(f"{NAME}: history has {len(history)} tensors for {len(weights)} weights, expected one less")
    if not history:
        return sample, model_output, coefficients, table, guidance, noise, clip, row, weights or None, None, None, None
    require_tensors(NAME, **{f"history[{i}]": tensor for i, tensor in enumerate(history)})
    past = (*history, None, None)[:3]
    return sample, model_output, coefficients, table, guidance, noise, clip, row, weights or None, *past


def _of_alphas(sample, alpha_t, alpha_prev, sigma, prediction, noise):
    """(coefficients, table), one of which is empty or None."""
    if prediction not in PREDICTIONS:
        raise ValueError(f"{NAME}: prediction is {prediction!r}, expected {', '.join(PREDICTIONS)}")
    if alpha_t is None or alpha_prev is None:
        raise ValueError(f"{NAME}: alpha_t or alpha_prev is None, expected both, or a table")
    floats = type(alpha_t) is type(alpha_prev) is type(sigma) is float
    host = (alpha_t, alpha_prev, sigma) if floats else [number_on_host(v) for v in (alpha_t, alpha_prev, sigma)]
    if floats or None not in host:
        if host[2] and noise is None:
            raise ValueError(f"{NAME}: noise is None, expected a tensor of sample's shape as sigma is {host[2]}")
        return (coefficients_of if torch.compiler.is_compiling() else _values_of)(*host, prediction), None
    require_tensors(NAME, sample=sample)
    table = coefficient_table(sample, alpha_t, alpha_prev, sigma, prediction)
    if noise is None and host[2] != 0:
        raise ValueError(f"{NAME}: noise is None, expected a tensor of sample's shape as sigma is a tensor")
    return _in_the_table(), table


def check(
    sample: torch.Tensor,
    model_output: torch.Tensor,
    coefficients: Sequence[float],
    table: torch.Tensor | None,
    guidance: float | None,
    noise: torch.Tensor | None,
    clip: float | None,
    row: torch.Tensor | None = None,
    weights: Sequence[float] | None = None,
    *history: torch.Tensor | None,
) -> None:
    if sample.dim() == 0:
        raise ValueError(f"{NAME}: sample has shape [], expected [N, ...]")
    require_float(NAME, "sample", sample)
    for name, tensor in (("model_output", model_output), ("noise", noise)):
        if tensor is not None and not tensor.dtype.is_floating_point:
            raise ValueError(f"{NAME}: {name} is {short(tensor.dtype)}, expected a floating type")
    require_device(NAME, "sample", sample.device, model_output=model_output, noise=noise, table=table, row=row)
    N, *rest = sample.shape
    if guidance is None:
        require_shape(NAME, "model_output", model_output, (N, *rest), "sample's shape")
    else:
        if not math.isfinite(guidance):
            raise ValueError(f"{NAME}: guidance is {guidance}, expected a finite number")
        require_shape(NAME, "model_output", model_output, (2 * N, *rest), "with guidance, [2N, ...]")
    require_shape(NAME, "noise", noise, (N, *rest), "sample's shape")
    _check_coefficients(sample, coefficients, table, row)
    if weights is not None or any(tensor is not None for tensor in history):
        _check_history(sample, weights, history)
    if clip is not None and not clip > 0:
        raise ValueError(f"{NAME}: clip is {clip}, expected more than 0")


def _check_coefficients(sample, coefficients, table, row):
    if table is None:
        if len(coefficients) != 7:
            raise ValueError(f"{NAME}: coefficients has {len(coefficients)} values, expected 7, or a table")
        if row is not None:
            raise ValueError(f"{NAME}: row is given without a table")
        return
    wanted = torch.float64 if sample.dtype is torch.float64 else torch.float32
    require_dtype(NAME, (wanted,), table=table)
    N = sample.shape[0]
    if row is None:
        require_shape(NAME, "table", table, (N, 7), "[N, 7]")
        return
    if table.dim() != 2 or table.shape[1] != 7:
        raise ValueError(f"{NAME}: table has shape {list(table.shape)}, expected [rows, 7]")
    require_dtype(NAME, (torch.int64,), row=row)
    if row.dim() != 1 or row.shape[0] not in (1, N):
        raise ValueError(f"{NAME}: row has shape {list(row.shape)}, expected [1] or [N] = [{N}]")


def _check_history(sample, weights, history):
    count, found = sum(tensor is not None for tensor in history), len(weights or ())
    if found != count + 1:
        raise ValueError(f"{NAME}: weights has {found} values for {count} of history, expected one more")
    for i, tensor in enumerate(history[:count]):
        name = f"history[{i}]"
        require_device(NAME, "sample", sample.device, **{name: tensor})
        require_shape(NAME, name, tensor, tuple(sample.shape), "sample's shape")
        if not tensor.dtype.is_floating_point:
            raise ValueError(f"{NAME}: {name} is {short(tensor.dtype)}, expected a floating type")


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
    "float? clip, Tensor? row, float[]? weights, Tensor? history1, Tensor? history2, "
    "Tensor? history3) -> (Tensor, Tensor)",
    check=check,
    fake=_fake,
    autocast=_autocast,
    normalise=_arguments,
    example=_example,
    numbers=2,
)
ddim_step.op = op


@op.backend("torch")
def _reference(sample, model_output, coefficients, table, guidance, noise, clip, row=None, weights=None, *history):
    dtype = torch.float64 if sample.dtype is torch.float64 else torch.float32
    x, m = sample.to(dtype), model_output.to(dtype)
    if table is not None:
        table = table if row is None else rows_of(table, row)
        coefficients = table.to(dtype).reshape(-1, 7, *[1] * (x.dim() - 1)).unbind(1)
    x0_x, x0_m, eps_x, eps_m, prev_x0, prev_eps, sigma = coefficients
    if guidance is not None:
        unconditional, conditional = m.chunk(2)
        m = unconditional + guidance * (conditional - unconditional)
    eps = eps_x * x + eps_m * m
    second = x0 = x0_x * x + x0_m * m
    if weights:
        second, eps = eps, weights[0] * eps
        for weight, past in zip(weights[1:], history, strict=False):
            eps = eps + weight * past.to(dtype)
        x0 = x0_x * x + x0_m * eps
    if clip is not None:
        x0 = x0.clamp(-clip, clip)
    prev = prev_x0 * x0 + prev_eps * eps
    if noise is not None:
        prev = prev + sigma * noise.to(dtype)
    both = prev, second if weights else x0
    return tuple(value.to(sample.dtype).contiguous(memory_format=memory_layout(sample)) for value in both)


def rows_of(table: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """[1 or N, 7]: the table's rows of these numbers, NaN where it has none."""
    if table.shape[0] == 0:
        return table.new_full((row.shape[0], 7), math.nan)
    found = table.index_select(0, row.clamp(0, table.shape[0] - 1))
    known = (row >= 0) & (row < table.shape[0])
    return torch.where(known[:, None], found, math.nan)


def dense(sample: torch.Tensor, *others: torch.Tensor | None) -> Sequence[torch.Tensor | None]:
    """Every tensor dense in sample's layout and dtype, so that one index serves all."""
    if all(value is None or value.dtype is sample.dtype and value.is_contiguous() for value in (sample, *others)):
        return sample, *others  # the usual case, without a call into torch
    return [
        None if value is None else value.to(sample.dtype).contiguous(memory_format=memory_layout(sample))
        for value in (sample, *others)
    ]


def _native(
    extension, sample, model_output, coefficients, table, guidance, noise, clip, row=None, weights=None, *history
):
    prev, x0 = empty_output(sample), empty_output(sample)
    if prev.numel():
        sample, model_output, noise, *history = dense(sample, model_output, noise, *history)
        fields = native_fields(sample, model_output, coefficients, table, guidance, clip)
        fields |= {"noise": noise, "prev": prev, "x0": x0, "row": row}
        fields |= {"rows": 0 if table is None else table.shape[0]}
        fields |= {"stride_row": row.stride(0) if row is not None and row.shape[0] > 1 else 0}
        fields |= {"multistep": weights is not None}
        fields |= zip(_WEIGHTS, (*(weights or ()), 0.0, 0.0, 0.0, 0.0), strict=False)
        fields |= zip(_HISTORY, (*history, None, None, None), strict=False)
        extension.ddim_step(fields, *native.place(sample))
    return prev, x0


_WEIGHTS = tuple(f"weight{i}" for i in range(4))
_HISTORY = tuple(f"history{i}" for i in range(1, 4))


def native_fields(
    sample: torch.Tensor,
    model_output: torch.Tensor,
    coefficients: Sequence[float],
    table: torch.Tensor | None,
    guidance: float | None,
    clip: float | None,
) -> dict:
    """The fields that DdimStepArgs and the gradient's struct (csrc/ops.h) have in common."""
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


def _triton(kernel, sample, model_output, coefficients, table, guidance, noise, clip, row=None, weights=None, *history):
    prev, x0 = empty_output(sample), empty_output(sample)
    if prev.numel():
        sample, model_output, noise, *history = dense(sample, model_output, noise, *history)
        table = None if table is None else table.contiguous()
        past = [tensor for tensor in history if tensor is not None]
        kernel(sample, model_output, noise, prev, x0, coefficients, table, guidance, clip, row, weights or (), past)
    return prev, x0


triton_backend.register(op, _triton)
speeds.register(op, lambda sample, *others: {"numel": sample.numel()})
