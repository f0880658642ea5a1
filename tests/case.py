"""One case of tests/cases.py, and what the makers of its inputs share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Case:
    op: str
    label: str
    make: Callable[..., tuple[tuple, dict]]  # make(dtype, N=...) -> the public function's (args, kwargs)
    big: bool = False  # too slow for interpreters


def randn(*shape, dtype, mean=0.0, std=1.0):
    return (torch.randn(*shape) * std + mean).to(dtype)


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)
