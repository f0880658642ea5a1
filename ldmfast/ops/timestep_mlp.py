"""The timestep embedding: sinusoid, linear, SiLU, linear."""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F

from ldmfast.ops import native, speeds, triton_backend
from ldmfast.ops.checks import require_device, require_dtype, require_float, require_shape, short
from ldmfast.ops.operator import Op

NAME = "timestep_mlp"


def timestep_mlp(
    t: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    w2: torch.Tensor,
    b2: torch.Tensor | None,
    *,
    dim: int,
    flip_sin_to_cos: bool = True,
    downscale_freq_shift: float = 0.0,
    max_period: float = 10000.0,
    backend: str | None = None,
) -> torch.Tensor:
    """w2 SiLU(w1 sinusoid(t) + b1) + b2: diffusers' `Timesteps` and `TimestepEmbedding` in one.

    t         [N]       int or float
    w1, b1    [F, dim], [F]   float16 | bfloat16 | float32 (float64: the reference); b1 may be None
    w2, b2    [E, F], [E]     dtype of w1; b2 may be None
    dim       width of the sinusoid: sines and cosines of t * max_period ** (-i / (dim // 2 - downscale_freq_shift));
              cosines first with flip_sin_to_cos; an odd dim ends in a zero
    returns   [N, E]    dtype of w1; the sinusoid is float32, rounded to that dtype before the first layer

    Raises TypeError for what is no tensor; ValueError naming the argument for a wrong shape, dtype or device, or an
    unknown backend; NotImplementedError with the reason of each backend that refuses.
    Traffic: the weights.   Source: Vaswani et al. 2017, section 3.5; Ho et al. 2020, appendix B.
    """
    shift, period = float(downscale_freq_shift), float(max_period)
    return op(t, w1, b1, w2, b2, dim, flip_sin_to_cos, shift, period, backend)


def _arguments(t, w1, b1, w2, b2, *, dim, flip_sin_to_cos=True, downscale_freq_shift=0.0, max_period=10000.0):
    return t, w1, b1, w2, b2, dim, flip_sin_to_cos, float(downscale_freq_shift), float(max_period)


def check(
    t: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    w2: torch.Tensor,
    b2: torch.Tensor | None,
    dim: int,
    flip_sin_to_cos: bool,
    downscale_freq_shift: float,
    max_period: float,
) -> None:
    if t.dim() != 1:
        raise ValueError(f"{NAME}: t has shape {list(t.shape)}, expected [N]")
    if t.dtype is torch.bool or t.dtype.is_complex:
        raise ValueError(f"{NAME}: t is {short(t.dtype)}, expected an integer or floating type")
    require_float(NAME, "w1", w1)
    require_dtype(NAME, (w1.dtype,), b1=b1, w2=w2, b2=b2)
    require_device(NAME, "w1", w1.device, t=t, b1=b1, w2=w2, b2=b2)
    if dim < 2 or dim // 2 <= downscale_freq_shift:
        shift = f"downscale_freq_shift={downscale_freq_shift}"
        raise ValueError(f"{NAME}: dim={dim} with {shift}, expected dim // 2 above it")
    if max_period <= 0:
        raise ValueError(f"{NAME}: max_period is {max_period}, expected more than 0")
    if w1.dim() != 2 or w1.shape[1] != dim:
        raise ValueError(f"{NAME}: w1 has shape {list(w1.shape)}, expected [F, dim] = [F, {dim}]")
    if w2.dim() != 2 or w2.shape[1] != w1.shape[0]:
        raise ValueError(f"{NAME}: w2 has shape {list(w2.shape)}, expected [E, F] = [E, {w1.shape[0]}]")
    require_shape(NAME, "b1", b1, (w1.shape[0],), "[F]")
    require_shape(NAME, "b2", b2, (w2.shape[0],), "[E]")


def _fake(t, w1, b1, w2, *others):
    return w1.new_empty(t.shape[0], w2.shape[0])


def _example(dtype, device):
    """SD1.5's, for guidance's two halves."""
    generator = torch.Generator().manual_seed(0)
    randn = functools.partial(torch.randn, generator=generator)
    tensors = randn(1280, 320) * 320**-0.5, randn(1280), randn(1280, 1280) * 1280**-0.5, randn(1280)
    t = torch.tensor([999, 1], device=device)
    return _arguments(t, *(tensor.to(device, dtype) for tensor in tensors), dim=320)


def _autocast(dtype, t, w1, b1, w2, b2, *others):
    if w1.dtype is torch.float64:
        return t, w1, b1, w2, b2, *others
    return t, *[None if tensor is None else tensor.to(dtype) for tensor in (w1, b1, w2, b2)], *others


op = Op(
    NAME,
    "(Tensor t, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, int dim, bool flip_sin_to_cos, "
    "float downscale_freq_shift, float max_period) -> Tensor",
    check=check,
    fake=_fake,
    autocast=_autocast,
    normalise=_arguments,
    example=_example,
)
timestep_mlp.op = op


def frequencies(
    dim: int, downscale_freq_shift: float, max_period: float, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """[dim // 2] on the CPU. In float32 the same steps as diffusers' get_timestep_embedding, so the same bits."""
    half = dim // 2
    exponent = -math.log(max_period) * torch.arange(half, dtype=dtype, device="cpu")
    return torch.exp(exponent / (half - downscale_freq_shift))


@functools.lru_cache(maxsize=64)
def _frequencies_on(device, dim, downscale_freq_shift, max_period):
    with torch.inference_mode(False):  # the cache outlives this call: it must not hold inference tensors
        return native.constant(frequencies(dim, downscale_freq_shift, max_period).to(device))


def sinusoid(
    t: torch.Tensor, dtype: torch.dtype, dim: int, flip_sin_to_cos: bool, downscale_freq_shift: float, max_period: float
) -> torch.Tensor:
    freqs = frequencies(dim, downscale_freq_shift, max_period, dtype).to(t.device)
    angles = t.to(dtype)[:, None] * freqs
    parts = [angles.cos(), angles.sin()] if flip_sin_to_cos else [angles.sin(), angles.cos()]
    return F.pad(torch.cat(parts, dim=-1), (0, dim % 2))  # [N, dim]


@op.backend("torch")
def _reference(t, w1, b1, w2, b2, dim, flip_sin_to_cos, downscale_freq_shift, max_period):
    dtype = torch.float64 if w1.dtype is torch.float64 else torch.float32
    embedding = sinusoid(t, dtype, dim, flip_sin_to_cos, downscale_freq_shift, max_period).to(w1.dtype)
    return F.linear(F.silu(F.linear(embedding, w1, b1)), w2, b2)


def kernel_inputs(
    t: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    w2: torch.Tensor,
    b2: torch.Tensor | None,
    dim: int,
    downscale_freq_shift: float,
    max_period: float,
) -> tuple[torch.Tensor | None, ...]:
    freqs = _frequencies_on(w1.device, dim, downscale_freq_shift, max_period)
    b1, b2 = (None if bias is None else bias.contiguous() for bias in (b1, b2))
    return t.to(torch.float32).contiguous(), freqs, w1.contiguous(), b1, w2.contiguous(), b2


def _native(extension, t, w1, b1, w2, b2, dim, flip_sin_to_cos, downscale_freq_shift, max_period):
    out = w1.new_empty(t.shape[0], w2.shape[0])
    if out.numel() == 0:
        return out
    t, freqs, w1, b1, w2, b2 = kernel_inputs(t, w1, b1, w2, b2, dim, downscale_freq_shift, max_period)
    fields = native_fields(t, freqs, w1, b1, w2, dim, flip_sin_to_cos)
    extension.timestep_mlp({"b2": b2, "out": out, **fields}, *native.place(w1))
    return out


def native_fields(
    t: torch.Tensor,
    freqs: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    w2: torch.Tensor,
    dim: int,
    flip_sin_to_cos: bool,
) -> dict:
    """TimestepMlpArgs of csrc/ops.h but for b2 and out; the gradient's struct has these fields, too."""
    return {
        "t": t,
        "freqs": freqs,
        "w1": w1,
        "b1": b1,
        "w2": w2,
        "N": t.shape[0],
        "dim": dim,
        "F": w1.shape[0],
        "E": w2.shape[0],
        "flip_sin_to_cos": flip_sin_to_cos,
        "dtype": native.DTYPES[w1.dtype],
    }


native.register(op, _native, lead=1)


def _triton(kernel, t, w1, b1, w2, b2, dim, flip_sin_to_cos, downscale_freq_shift, max_period):
    out = w1.new_empty(t.shape[0], w2.shape[0])
    if out.numel():
        hidden = torch.empty(t.shape[0], w1.shape[0], dtype=torch.float32, device=w1.device)
        kernel(*kernel_inputs(t, w1, b1, w2, b2, dim, downscale_freq_shift, max_period), out, flip_sin_to_cos, hidden)
    return out


triton_backend.register(op, _triton)
speeds.register(op, lambda t, w1, b1, w2, *others: {"N": t.shape[0], "K": w1.shape[1], "C": w2.shape[0]}, lead=1)
