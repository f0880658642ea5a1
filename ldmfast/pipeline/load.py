"""`ldmfast.load`: any latent diffusion model, by name, from a folder or a single file, ready to draw.

pipe = ldmfast.load("emoji320")                           # a model that ships
pipe = ldmfast.load("v1-5-pruned.safetensors")            # Stable Diffusion 1, 2, XL; their inpainting models
pipe = ldmfast.load("celeba256/model.ckpt", ema=True)     # the models released with the LDM paper
vae = ldmfast.load("vq-f8/model.ckpt")                    # an autoencoder alone
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from ldmfast.conditioning import Conditioner
from ldmfast.models.graph import Graphed
from ldmfast.pipeline.added_files import add_files, check_load_options
from ldmfast.pipeline.assemble import assemble
from ldmfast.pipeline.load_embedding import Embedding
from ldmfast.pipeline.load_lora import Lora
from ldmfast.pipeline.optimize import switch_to_graphs
from ldmfast.pipeline.pipeline import LatentDiffusionPipeline


def load(
    source: str | Path,
    *,
    text_encoder: str | Path | None = None,
    ema: bool = False,
    config: dict | str | Path | None = None,
    dtype: torch.dtype | None = torch.float32,
    allow_missing: bool = False,
    tokenizer: str | Path | None = None,
    autoencoder: str | Path | None = None,
    conditioner: Conditioner | None = None,
    variant: str | None = None,
    embedding: Embedding | Iterable[Embedding] | None = None,
    lora: Lora | Iterable[Lora] | None = None,
    graph: bool = False,
    **others: Any,
) -> LatentDiffusionPipeline | Any:
    """A ready model: denoiser, autoencoder, conditioner and noise schedule.

    source         a model that ships, by its name; a folder, as ldmfast or diffusers saves it; a released file, of
                   safetensors or torch.save, whatever its ending: nothing that a pickle names is run
    text_encoder   "minilm", a hub name or a folder, in place of the text encoder that the folder names, or for a
                   denoiser that was saved without one
    ema            the averaged denoiser of a released file; without it the plain one
    config         the original YAML (its path, text or content) of a released file whose family is not known, or to
                   override what its family says: heads, betas, scale factor, parameterization. In which order a file is
                   believed: released/noise_schedule.py; a prediction type that had to be guessed is warned of
    dtype          of the weights in memory; None: each network's own in the file, the one that holds all where it mixes
                   several (float32 from a folder that ldmfast trained)
    allow_missing  take weights that a released model lacks at random
    tokenizer      CLIP's, for a file without one: a folder, a file of its vocabulary, "open_clip" for the installed
                   package's, or a hub name; default: openai/clip-vit-large-patch14 among the hub's downloads
    autoencoder    a file or folder with the autoencoder, for a denoiser saved without one
    conditioner    a Conditioner, for a denoiser saved without one
    embedding      a file of textual inversion, (file, word), or a list of either, as `load_embedding` takes them
    lora           a LoRA file, (file, scale), or several of either, as `load_lora` takes them
    variant        of a folder's weights, such as "fp16"; parts without it give their plain ones. None: the plain ones,
                   or the only variant that is there
    graph          replay the denoiser's steps as CUDA graphs, as its `graph()` does; needs an NVIDIA GPU
    returns        a LatentDiffusionPipeline; a diffusers pipeline over ldmfast's networks where the model needs more
                   than a prompt and a mask: depth, editing, SDXL's refiner; a network if there is only that

    The pictures of a diffusers folder are those of diffusers' own pipeline, and so is its sampler; but a prompt with
    explicit weights, (word:1.3), is read with them. What stays with diffusers (IP-Adapter, ControlNet, offloading, ...)
    is had by `ldmfast.optimize` on its pipeline; so says the error for a name of theirs.
    Raises ValueError, FileNotFoundError, OSError in one sentence naming the source, TypeError naming the argument.
    """
    check_load_options(others)
    found = assemble(
        source,
        text_encoder=text_encoder,
        ema=ema,
        config=config,
        dtype=dtype,
        allow_missing=allow_missing,
        tokenizer=tokenizer,
        autoencoder=autoencoder,
        conditioner=conditioner,
        variant=variant,
    )
    pipeline = LatentDiffusionPipeline(**found) if isinstance(found, dict) else found
    add_files(pipeline, embedding=embedding, lora=lora)
    if graph:
        switch_to_graphs(pipeline if isinstance(pipeline, Graphed) else getattr(pipeline, "unet", None), str(source))
    return pipeline
