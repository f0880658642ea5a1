"""Modules over `ldmfast.ops`: the U-Net, the autoencoder, the text encoder. Loaded on first use."""

import importlib

_HOMES = {
    "AutoencoderKL": "ldmfast.models.autoencoder",
    "TextEncoder": "ldmfast.models.conditioning",
    "UNet": "ldmfast.models.unet",
}
__all__ = list(_HOMES)


def __getattr__(name):
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
