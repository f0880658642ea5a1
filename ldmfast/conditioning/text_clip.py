"""Prompts to the states of CLIP's text tower: tokens in chunks, weights, layers left out, embeddings of many vectors.

The tower reads 77 tokens: a beginning, 75 of the prompt, an end. A longer prompt is cut, or read in chunks of 75, whose
states stand side by side in the context. Prompts of fewer chunks are filled with zeros that the mask leaves out: so a
prompt's picture does not depend on its company.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ldmfast.conditioning.condition import padded
from ldmfast.conditioning.text_weights import BREAK, PromptReading, pieces

PLAIN = PromptReading(weights=False)
_BREAK = re.compile(rf"\s*\b{BREAK}\b\s*")


@dataclass(frozen=True)
class Chunk:
    """One reading of the tower.   ids  [77], beginning and end among them;   weights  [77], of their states"""

    ids: list[int]
    weights: list[float]


def chunks(tokenizer: Callable[..., Any], prompt: str, length: int, reading: PromptReading = PLAIN) -> list[Chunk]:
    """A prompt as the tower of `length` tokens reads it: one chunk, or as many as it takes.

    Raises ValueError for what prompt_weights does not take.
    """
    room = length - 2
    parts = [_units(tokenizer, text, reading) for text in (_BREAK.split(prompt) if reading.long else [prompt])]
    filled: list[list[tuple[list[int], float]]] = []
    for units in parts:
        filled.append([])
        for ids, weight in units:
            if reading.long and filled[-1] and sum(len(i) for i, _ in filled[-1]) + len(ids) > room:
                filled.append([])
            filled[-1].append((ids, weight))
    return [_chunk(tokenizer, units, room) for units in filled]


def _units(tokenizer, text: str, reading: PromptReading) -> list[tuple[list[int], float]]:
    """[(ids, weight)]: a token each, or all the vectors of one embedding, which stay together."""
    together = vectors(tokenizer)
    return [
        (together.get(token, [token]), weight)
        for piece, weight in pieces(text, reading.weights)
        for token in tokenizer(piece, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
    ]


def vectors(tokenizer: Callable[..., Any]) -> dict[int, list[int]]:
    """{id of an embedding's token: the ids of its vectors}, those of <x>, <x>_1, <x>_2, ... as in diffusers."""
    added = getattr(tokenizer, "added_tokens_encoder", {})
    found = {}
    for name, token in added.items():
        ids = [token]
        while (following := added.get(f"{name}_{len(ids)}")) is not None:
            ids.append(following)
        if len(ids) > 1:
            found[token] = ids
    return found


def _chunk(tokenizer, units: list[tuple[list[int], float]], room: int) -> Chunk:
    ids = [token for unit, _ in units for token in unit][:room]
    weights = [weight for unit, weight in units for _ in unit][:room]
    fill = room - len(ids)
    padding = tokenizer.pad_token_id
    return Chunk(
        [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id, *[padding] * fill], [1.0, *weights, *[1.0] * (fill + 1)]
    )


@torch.no_grad()
def run_tower(model: nn.Module, ids: list[list[int]], device: torch.device, batch: int, hidden: bool) -> list[Any]:
    """The tower's outputs for rows of ids, `batch` at once.   hidden  with the states of every layer"""
    more = {"output_hidden_states": True} if hidden else {}
    parts = (ids[start : start + batch] for start in range(0, len(ids), batch))
    return [model(torch.tensor(part, device=device), **more) for part in parts]


def norm_of(model: nn.Module) -> nn.Module:
    """The norm after the tower's last layer, which transformers below 5 keeps a level deeper."""
    return getattr(model, "text_model", model).final_layer_norm


def weighted(states: torch.Tensor, of: Sequence[Chunk], keep_mean: bool) -> torch.Tensor:
    """States [R, L, E] of R chunks times their tokens' weights.

    keep_mean   each chunk's mean is brought back to what it was
    Source: the web UI's emphasis "Original" with keep_mean, "No norm" without, one chunk at a time.
    """
    if all(weight == 1 for chunk in of for weight in chunk.weights):
        return states
    factors = torch.tensor([chunk.weights for chunk in of], device=states.device, dtype=states.dtype)[..., None]
    found = states * factors
    if keep_mean:
        before, after = (x.float().mean(dim=(1, 2), keepdim=True) for x in (states, found))
        found = found * torch.where(after == 0, 1.0, before / after).to(found.dtype)
    plain = (factors == 1).all(dim=1, keepdim=True)  # a chunk without weights keeps its bits
    return torch.where(plain, states, found)


def side_by_side(states: torch.Tensor, counts: list[int]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(context [N, S, E], its mask [N, S] or None) from the states [R, L, E] of the chunks of N prompts.

    counts  how many of the R chunks each prompt has
    """
    return padded([part.flatten(0, 1) for part in states.split(counts)])


def check_captions(captions: list, who: str) -> None:
    """Raises ValueError for what is no string."""
    wrong = next((c for c in captions if not isinstance(c, str)), None)
    if wrong is not None:
        raise ValueError(f"{who}: a caption must be a string; got {wrong!r:.80}")


def cut(
    tokenizers: Sequence[Callable[..., Any]], captions: list[str], length: int, reading: PromptReading
) -> list[tuple[str, int]]:
    """[(caption, tokens)] of the captions that would lose their end."""
    if reading.long:
        return []
    return [
        (caption, length)
        for caption in captions
        if isinstance(caption, str)  # read refuses the others
        and any(sum(len(ids) for ids, _ in _units(t, caption, reading)) > length - 2 for t in tokenizers)
    ]
