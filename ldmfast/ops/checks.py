"""What the ops' checks share: each failure names the op, the argument, what came and what was wanted."""

from __future__ import annotations

from typing import Any

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def require_tensors(op: str, **arguments: Any) -> None:
    """Every argument is a tensor; one named with a trailing `_` may be None."""
    for name, value in arguments.items():
        if not (name[-1] == "_" if value is None else isinstance(value, torch.Tensor)):
            raise TypeError(f"{op}: {name.rstrip('_')} is {type(value).__name__}, expected a tensor")


def require_shape(op: str, name: str, tensor: torch.Tensor | None, shape: tuple[int, ...], meaning: str) -> None:
    if tensor is not None and tuple(tensor.shape) != shape:
        raise ValueError(f"{op}: {name} has shape {list(tensor.shape)}, expected {meaning} = {list(shape)}")


def require_device(op: str, like: str, device: torch.device, **tensors: torch.Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, expected {device} as {like}")


def require_float(op: str, name: str, tensor: torch.Tensor) -> None:
    if tensor.dtype not in FLOATS:
        raise ValueError(f"{op}: {name} is {short(tensor.dtype)}, expected {', '.join(map(short, FLOATS))}")


def require_dtype(op: str, wanted: tuple[torch.dtype, ...], **tensors: torch.Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in wanted:
            choices = " or ".join(dict.fromkeys(map(short, wanted)))
            raise ValueError(f"{op}: {name} is {short(tensor.dtype)}, expected {choices}")


def require_layer_norm(
    op: str, K: int, norm_weight: torch.Tensor | None, norm_bias: torch.Tensor | None, eps: float | None
) -> None:
    """The LayerNorm of an op's input [..., K]: weight and bias [K], eps; all of them None where there is none."""
    require_shape(op, "norm_weight", norm_weight, (K,), "[K]")
    require_shape(op, "norm_bias", norm_bias, (K,), "[K]")
    if eps is not None and not eps > 0:
        raise ValueError(f"{op}: layer_norm's eps is {eps}, expected more than 0")
    if eps is None and not (norm_weight is None and norm_bias is None):
        raise ValueError(f"{op}: eps is None beside norm_weight or norm_bias, expected a number")
