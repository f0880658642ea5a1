"""ldmfast: latent diffusion with fused kernels.

    from ldmfast import UNet              # in place of diffusers' UNet2DConditionModel

The names below are loaded on first use: `import ldmfast` itself imports only torch, and nothing touches CUDA.
"""

from __future__ import annotations

import importlib

from ldmfast._version import __version__

_HOMES = {
    "AutoencoderKL": "ldmfast.models.autoencoder",
    "Condition": "ldmfast.conditioning.base",
    "Conditioner": "ldmfast.conditioning.base",
    "DDIMScheduler": "ldmfast.diffusion.ddim",
    "DDPMScheduler": "ldmfast.diffusion.ddpm",
    "LatentDiffusionPipeline": "ldmfast.pipeline",
    "PNDMScheduler": "ldmfast.diffusion.pndm",
    "TextToImagePipeline": "ldmfast.pipeline",
    "UNet": "ldmfast.models.unet",
    "UNet2D": "ldmfast.models.unet2d",
    "VQModel": "ldmfast.models.vq",
    "explain": "ldmfast.ops",
    "fixed_order": "ldmfast.ops",
    "load": "ldmfast.pipeline.load",
    "load_embedding": "ldmfast.pipeline.load_embedding",
    "load_lora": "ldmfast.pipeline.load_lora",
    "numerics": "ldmfast.ops",
    "optimize": "ldmfast.pipeline.optimize",
    "use_backend": "ldmfast.ops",
    "verify": "ldmfast.evaluation.verify_models",
}
__all__ = [*_HOMES, "__version__", "ops"]


def __getattr__(name: str):
    if name == "ops":
        return importlib.import_module("ldmfast.ops")
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'ldmfast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
