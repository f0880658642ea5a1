"""Modules over `ldmfast.ops`: the U-Net, the autoencoder, the text encoder. Loaded on first use."""

import importlib

_HOMES = {
    "AutoencoderKL": "diffusers",
    "TextEncoder": "ldmfast.models.conditioning",
    "UNet": "diffusers",
}
__all__ = list(_HOMES)


def __getattr__(name):
    if name in _HOMES:
        module = importlib.import_module(_HOMES[name])
        return getattr(module, "UNet2DConditionModel" if (name, _HOMES[name]) == ("UNet", "diffusers") else name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
