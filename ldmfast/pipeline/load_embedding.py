"""`load_embedding`: files of textual inversion on a pipeline, ours or diffusers', as people have them.

A token and its vectors become words of the tokenizer and rows of the tower's table, named as diffusers names them (x,
x_1, x_2, ...), so that diffusers' own pipelines read them, too.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from ldmfast.conditioning.text import TextEncoder
from ldmfast.conditioning.text_clip import vectors
from ldmfast.conditioning.text_sdxl import TwoTextEncoders
from ldmfast.released.textual_inversion import embedding_path, read_embedding

Embedding = str | Path | tuple[str | Path, str]


def load_embedding(target: Any, *files: Embedding) -> list[str]:
    """Add words that embeddings stand for; returns them. They stay; the same word again takes the new vectors.

    target  a LatentDiffusionPipeline with CLIP's text towers, or a pipeline of diffusers'
    files   a path or (path, word): .safetensors, .pt or .bin, of diffusers', the web UI's or kohya's layout
            (released/textual_inversion.py); for SDXL with vectors for both towers. The word is the file's own or its
            name, and is written in a prompt, or a negative one
    Raises FileNotFoundError; ValueError for a file that is none, or another model's, or a word that is known already.
    What is saved of the pipeline is without them.
    """
    towers = _towers(target)
    asked = [(file, None) if isinstance(file, str | os.PathLike) else file for file in files]
    found = [(embedding_path(path), read_embedding(path, token)) for path, token in asked]
    for path, by_token in found:
        for token, rows in by_token.items():
            _check(path, token, rows, towers)
    for _, by_token in found:
        for token, rows in by_token.items():
            for (tokenizer, model), values in zip(towers, rows, strict=True):
                _add(tokenizer, model, token, values)
    words = [token for _, by_token in found for token in by_token]
    if not isinstance(target, diffusers.DiffusionPipeline):
        target.words = tuple(dict.fromkeys([*target.words, *words]))
    return words


def as_embeddings(embedding: Embedding | Iterable[Embedding] | None) -> list[Embedding]:
    """What an option `embedding=` may be: nothing, one file, (file, word), or several of either in a list."""
    if embedding is None:
        return []
    single = isinstance(embedding, str | os.PathLike | tuple)
    return [embedding] if single else list(embedding)


def _towers(target: Any) -> list[tuple[Any, nn.Module]]:
    """The (tokenizer, text tower) pairs. Raises ValueError for a model that reads no prompt with CLIP's."""
    if isinstance(target, diffusers.DiffusionPipeline):
        parts = [("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2")]
        pairs = [tuple(getattr(target, name, None) for name in pair) for pair in parts]
        pairs = [pair for pair in pairs if None not in pair]
    else:
        pairs = []
        for module in target.conditioner.modules():
            if isinstance(module, TextEncoder) and module.reads_prompts:
                pairs.append((module.tokenizer, module.model))
            elif isinstance(module, TwoTextEncoders):
                pairs += zip(module.tokenizers, module.models, strict=True)
    if not pairs or not all(hasattr(model, "get_input_embeddings") for _, model in pairs):
        raise ValueError("an embedding is for a model whose prompts CLIP's text tower reads; this one has none")
    return pairs


def _check(path: Path, token: str, rows: list[torch.Tensor], towers: list[tuple[Any, nn.Module]]) -> None:
    widths = [model.get_input_embeddings().weight.shape[1] for _, model in towers]
    found = [values.shape[1] for values in rows]
    if found != widths:
        given, wanted = (" and ".join(map(str, each)) for each in (found, widths))
        known = {(768,): ", SD1's", (1024,): ", SD2's", (768, 1280): ", SDXL's"}.get(tuple(found), "")
        raise ValueError(f"{path} has vectors of width {given}{known}; this model's text towers take {wanted}")
    if not token.strip() or token != token.strip() or re.search(r"[()\[\]:]", token):
        raise ValueError(f"{path}: {token!r} cannot be written in a prompt; give another word: (FILE, word), FILE=WORD")
    for (tokenizer, _), values in zip(towers, rows, strict=True):
        _check_word(path, token, len(values), tokenizer)


def _check_word(path: Path, token: str, count: int, tokenizer: Any) -> None:
    known, added = tokenizer.get_vocab(), tokenizer.added_tokens_encoder  # an AbsentTokenizer says what it is
    if token in added:
        there = len(vectors(tokenizer).get(added[token], [0]))
        if there != count:
            raise ValueError(f"{path}: {token!r} stands for {there} vectors already, now {count}; give another word")
        return
    taken = next((name for name in _names(token, count + 1) if name in known), None)
    if taken:
        raise ValueError(f"{path}: {taken!r} is a word that the tokenizer knows; give another: (FILE, word), FILE=WORD")


def _names(token: str, count: int) -> list[str]:
    return [token, *(f"{token}_{i}" for i in range(1, count))]


def _add(tokenizer: Any, model: nn.Module, token: str, rows: torch.Tensor) -> None:
    from transformers import AddedToken

    names = _names(token, len(rows))
    # a word of letters only is one where it stands alone: "cat" is no part of "category"; the Python tokenizers of
    # transformers 4 would ask for spaces around it, and so not know it before a comma
    alone = re.fullmatch(r"\w+", token) is not None and getattr(tokenizer, "is_fast", False)
    tokenizer.add_tokens(
        [AddedToken(name, single_word=alone) for name in names if name not in tokenizer.added_tokens_encoder]
    )
    ids = tokenizer.convert_tokens_to_ids(names)
    table = model.get_input_embeddings()
    if max(ids) >= len(table.weight):
        model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
        table = model.get_input_embeddings()
    with torch.no_grad():
        weight = table.weight if table.weight.is_leaf else table.weight.detach()
        weight[ids] = rows.to(weight)
    table.requires_grad_(False)
    inner = getattr(model, "text_model", model)
    if getattr(inner, "eos_token_id", None) == 2:  # of old configurations: the highest id is taken for the prompt's end
        inner.eos_token_id = tokenizer.eos_token_id
