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
        if not isinstance(value, torch.Tensor) and not (name.endswith("_") and value is None):
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
