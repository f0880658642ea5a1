"""What `load`'s options put on a pipeline once it stands: embeddings, then LoRAs."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

from ldmfast.pipeline import diffusers_names
from ldmfast.pipeline.assemble import assemble
from ldmfast.pipeline.load_embedding import Embedding, as_embeddings, load_embedding
from ldmfast.pipeline.load_lora import Lora, as_list, load_lora


def add_files(
    pipeline: Any,
    *,
    embedding: Embedding | Iterable[Embedding] | None = None,
    lora: Lora | Iterable[Lora] | None = None,
) -> None:
    """Put them on; None for none."""
    if embeddings := as_embeddings(embedding):
        load_embedding(pipeline, *embeddings)
    if lora is not None:
        load_lora(pipeline, *as_list(lora))


def check_load_options(options: Iterable[str]) -> None:
    """Raises TypeError for a name that `load` does not take, saying where it is found."""
    taken = [*list(inspect.signature(assemble).parameters)[1:], "embedding", "lora"]
    if others := [name for name in options if name not in taken]:
        raise diffusers_names.unknown_arguments("load", others, diffusers_names.LOAD, taken)
