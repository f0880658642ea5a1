"""Encoders of what a denoiser is conditioned on: prompts, classes, boxes, semantic maps, pictures.

condition.py, base.py      Condition; Conditioner
hybrid.py                  several conditioners at once
text.py, text_sdxl.py      frozen text encoders
text_clip.py               prompts as CLIP's text towers read them: chunks, weights, layers left out
text_weights.py            the grammar of weights, and what a call asks of the reading
transformer.py             tokens through a transformer that is trained with the denoiser
classes_and_boxes.py       classes and boxes as tokens
spatial.py                 maps and pictures beside the latent
"""

from __future__ import annotations

import importlib
from typing import Any

# the class that a saved folder names -> the module that holds it
CONDITIONERS = {
    "BoxEncoder": "ldmfast.conditioning.classes_and_boxes",
    "ClassEmbedder": "ldmfast.conditioning.classes_and_boxes",
    "Hybrid": "ldmfast.conditioning.hybrid",
    "LayoutEncoder": "ldmfast.conditioning.transformer",
    "LowResolution": "ldmfast.conditioning.spatial",
    "MapEncoder": "ldmfast.conditioning.spatial",
    "MaskedImage": "ldmfast.conditioning.spatial",
    "PlacedClass": "ldmfast.conditioning.classes_and_boxes",
    "TextEncoder": "ldmfast.conditioning.text",
    "TransformerText": "ldmfast.conditioning.transformer",
    "TwoTextEncoders": "ldmfast.conditioning.text_sdxl",
    "Unconditional": "ldmfast.conditioning.base",
}
_HOMES = {"Condition": "ldmfast.conditioning.condition", "Conditioner": "ldmfast.conditioning.base", **CONDITIONERS}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
