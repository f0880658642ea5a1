"""GEGLU of a linear layer's output, where the product itself does not end in it."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ldmfast.ops import native, triton_backend
from ldmfast.ops.checks import require_float
from ldmfast.ops.linear import rows
from ldmfast.ops.operator import Op

NAME = "geglu"


def geglu(x: torch.Tensor, *, backend: str | None = None) -> torch.Tensor:
    """h * gelu(g), h the first half of the last dimension and g the second; gelu with erf.

    x        [..., 2F]  float16 | bfloat16 | float32 (float64: the reference)
    returns  [..., F]   dtype of x, dense; computed in float32

    Raises TypeError for what is no tensor; ValueError for an odd last dimension, another dtype or an unknown backend;
    NotImplementedError with the reason of each backend that refuses.
    Traffic: 1.5 * x bytes.   Source: Shazeer 2020.
    """
    return op(*_arguments(x), backend)


def _arguments(x):
    return (x,)


def _check(x):
    if x.dim() < 1 or x.shape[-1] % 2:
        raise ValueError(f"{NAME}: x has shape {list(x.shape)}, expected [..., 2F]")
    require_float(NAME, "x", x)


def _empty(x):
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)


def _example(dtype, device):
    """The second level's feed-forward."""
    generator = torch.Generator().manual_seed(0)
    return _arguments(torch.randn(2, 256, 5120, generator=generator).to(device, dtype))


op = Op(
    NAME,
    "(Tensor x) -> Tensor",
    check=_check,
    fake=_empty,
    autocast=lambda dtype, x: (x,),  # as autocast leaves torch's gelu and product
    normalise=_arguments,
    example=_example,
)
geglu.op = op


@op.backend("torch")
def _reference(x):
    h, g = x.chunk(2, dim=-1)
    return (h * F.gelu(g)).contiguous()


def _native(extension, x):
    out = _empty(x)
    if out.numel():
        x = rows(x)
        fields = {"x": x, "stride_x": x.stride(0), "out": out, "M": x.shape[0], "F": out.shape[-1]}
        extension.geglu(fields | {"dtype": native.DTYPES[x.dtype]}, *native.place(x))
    return out


native.register(op, _native, modules=("cuda", "cuda-host"))


def _triton(kernel, x):
    out = _empty(x)
    if out.numel():
        kernel(rows(x), out.view(-1, out.shape[-1]))
    return out


triton_backend.register(op, _triton)
