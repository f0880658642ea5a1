"""From a prompt to pictures: the pipeline, its folder, and the ways in (`ldmfast.load`, `ldmfast.optimize`)."""

import importlib

_HOMES = {"LatentDiffusionPipeline": "ldmfast.pipeline.pipeline", "TextToImagePipeline": "ldmfast.pipeline.pipeline"}
__all__ = list(_HOMES)


def __getattr__(name):
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
