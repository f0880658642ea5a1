"""One line on a finished diffusers pipeline."""

from __future__ import annotations

from collections.abc import Iterable

import diffusers

from ldmfast.diffusion import catalogue
from ldmfast.models.graph import Graphed
from ldmfast.pipeline.load_lora import Lora, as_list, load_lora


def optimize(
    pipeline: diffusers.DiffusionPipeline, *, lora: Lora | Iterable[Lora] | None = None, graph: bool = False
) -> diffusers.DiffusionPipeline:
    """Put ldmfast's models under a diffusers pipeline, in place, sharing its weights; returns the pipeline.

    lora   a LoRA file, (file, scale), or several of either, as `load_lora` takes them
    graph  replay the U-Net's calls as CUDA graphs, as its `graph()` does: one launch a call in place of hundreds

    Its networks and its scheduler are taken over where they are exactly diffusers' classes and ldmfast has one of its
    own (diffusion/catalogue.py); other parts stay as they are, and so do the pictures. The pipeline still saves, and is
    loaded elsewhere, as a plain diffusers pipeline. A second call takes over what was put into it since.
    Call it before offloading or compiling. Raises ValueError if nothing in it is ldmfast's or could be, or if it is
    offloaded, or if graph is asked for where there is no U-Net of ldmfast's or no NVIDIA GPU; TypeError for what is no
    diffusers pipeline.
    """
    if not isinstance(pipeline, diffusers.DiffusionPipeline):
        raise TypeError(f"optimize takes a pipeline of diffusers'; got {type(pipeline).__name__}")
    found = {name: catalogue.take_over(component) for name, component in pipeline.components.items()}
    taken = {name: component for name, component in found.items() if component is not None}
    if not taken and not any(map(catalogue.is_ours, pipeline.components.values())):
        *most, last = (*catalogue.NETWORKS, *catalogue.SCHEDULERS)
        raise ValueError(f"{type(pipeline).__name__} has no {', '.join(most)} or {last} to take over")
    for name, component in taken.items():
        setattr(pipeline, name, component)  # models/index_names.py: model_index.json goes on naming diffusers' class
    if lora is not None:
        load_lora(pipeline, *as_list(lora))
    if graph:
        switch_to_graphs(getattr(pipeline, "unet", None), type(pipeline).__name__)
    return pipeline


def switch_to_graphs(unet: object, where: str) -> None:
    """Graph mode on for a U-Net of ours. Raises ValueError for what is none, or without an NVIDIA GPU."""
    if not isinstance(unet, Graphed):
        has = "none" if unet is None else f"a {type(unet).__name__}"
        raise ValueError(f"graph=True: {where} has no U-Net of ldmfast's, whose calls could be graphs; it has {has}")
    unet.graph()
