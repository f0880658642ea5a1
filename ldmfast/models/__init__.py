"""Modules over `ldmfast.ops`: the U-Nets and the autoencoders. Loaded on first use."""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "AutoencoderKL": "ldmfast.models.autoencoder",
    "UNet": "ldmfast.models.unet",
    "UNet2D": "ldmfast.models.unet2d",
    "VQModel": "ldmfast.models.vq",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
