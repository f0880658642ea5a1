"""From a prompt to pictures: the pipeline, its folder, and the ways in.

pipeline.py, call.py              from inputs to pictures; what a call may ask for
load.py, assemble.py              the one door, and how a name, a folder or a file becomes parts
text_towers.py, clip_tokenizer.py CLIP's text towers and tokenizers among them
prompts.py                        what the pictures of a call are guided towards, and away from
step_callback.py                  a function of the user's after each step
diffusers_names.py                what users of diffusers look for, and where it is
folder.py                         a pipeline as a folder
saved_autoencoder.py              the autoencoder alone, out of such a folder
load_lora.py, load_embedding.py   LoRA and textual inversion on it, or on a pipeline of diffusers'
lora_adapter.py, lora_layers.py   a LoRA file as an adapter of peft's, and peft's layers for a first one
added_files.py                    both by the options of `load`
optimize.py                       ldmfast under a live diffusers pipeline
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {"LatentDiffusionPipeline": "ldmfast.pipeline.pipeline", "TextToImagePipeline": "ldmfast.pipeline.pipeline"}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
