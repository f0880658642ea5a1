"""Where, on a GPU, one launch takes in what PyTorch starts several kernels for.

Only without a gradient: there each operation is differentiated by itself. Meta tensors take a GPU's way, so that its
launches can be counted without one (bench/checks/launches.py).
"""

from __future__ import annotations

import importlib.util

import torch
from torch import nn

from ldmfast import ops
from ldmfast.models.guard import plain
from ldmfast.ops.dispatcher import transformed
from ldmfast.ops.registry import OPS, chosen_backend

_SIXTEEN = (torch.float16, torch.bfloat16)
_TRITON = importlib.util.find_spec("triton") is not None


def on_gpu(x: torch.Tensor) -> bool:
    return x.device.type in ("cuda", "meta")


def fuses(x: torch.Tensor, op: str) -> bool:
    """Whether this op of ours stands in for PyTorch's operations on x."""
    name = chosen_backend()
    return (
        on_gpu(x)
        and not torch.is_grad_enabled()
        and (x.dtype is torch.float32 or x.dtype in _SIXTEEN)
        and (name is None or name in OPS[op].backends)
        and not torch.is_autocast_enabled("cuda")
        and not transformed()
    )


def products_fold(x: torch.Tensor) -> bool:
    """Whether a product of x takes in what surrounds it: in 16 bits, by Triton; in float32 PyTorch's is faster."""
    return _TRITON and x.dtype in _SIXTEEN and fuses(x, "linear")


def folds_product(m: nn.Linear | nn.Conv2d, x: torch.Tensor) -> bool:
    """Whether the product with m's weight does."""
    return products_fold(x) and plain(m) and m.weight.dtype == x.dtype


def folds_norm(m: nn.LayerNorm, x: torch.Tensor) -> bool:
    """Whether a product of x can begin with this LayerNorm."""
    return plain(m) and m.normalized_shape == x.shape[-1:] and (m.weight is None or m.weight.dtype == x.dtype)


def side_by_side(
    x: torch.Tensor, layers: tuple[nn.Linear, ...], norm: nn.LayerNorm | None = None
) -> tuple[torch.Tensor, ...] | None:
    """m(norm(x)) for each of two or three layers, by one product; None where they are not of one kind."""
    if not all(folds_product(m, x) and m.bias is None for m in layers) or len({m.weight.shape for m in layers}) > 1:
        return None
    if norm is not None and not folds_norm(norm, x):
        return None
    layer_norm = None if norm is None else (norm.weight, norm.bias, norm.eps)
    return ops.qkv_projection(x, *(m.weight for m in layers), layer_norm=layer_norm).unbind(-2)
