"""The conditions of a call: what its pictures are guided towards, and what away from."""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import dataclass
from typing import Any

import torch

from ldmfast.conditioning.base import Conditioner
from ldmfast.conditioning.condition import Condition
from ldmfast.conditioning.text_weights import PromptReading
from ldmfast.pipeline.call import Canvas


class PromptCut(UserWarning):
    """A prompt is longer than what the text encoder reads."""


@dataclass(frozen=True)
class Prompts:
    """What N pictures are conditioned on.

    inputs     N of what the conditioner takes
    negatives  N of the same, None for a picture without one; or None: none has one
    reading    how prompts are read, for CLIP's text towers
    """

    inputs: list
    negatives: list | None = None
    reading: PromptReading = PromptReading()

    def __getitem__(self, part: slice) -> Prompts:
        return Prompts(self.inputs[part], self.negatives and self.negatives[part], self.reading)

    def completed(self, conditioner: Conditioner, seeds: list[int]) -> Prompts:
        """With what they leave open drawn, each by its picture's seed."""
        inputs, negatives = conditioner.complete(self.inputs, seeds), self.negatives
        if negatives is not None:
            there = [i for i, each in enumerate(negatives) if each is not None]
            drawn = conditioner.complete([negatives[i] for i in there], [seeds[i] for i in there])
            negatives = list(negatives)
            for i, each in zip(there, drawn, strict=True):
                negatives[i] = each
        return Prompts(inputs, negatives, self.reading)

    def condition(self, conditioner: Conditioner, canvas: Canvas) -> Condition:
        """The condition of the N pictures."""
        pictured = conditioner.with_pictures(self.inputs, canvas.image, canvas.mask)
        return conditioner.read(pictured, self.reading)

    def unconditional(self, conditioner: Conditioner, canvas: Canvas, condition: Condition) -> Condition:
        """What guidance leads away from, for the N pictures; pictures and sizes beside the latent are `condition`'s."""
        found = self._negative(conditioner, canvas)
        kept = {"time_ids": condition.time_ids}
        if conditioner.takes_pictures:
            kept["concat"] = condition.concat
        return dataclasses.replace(found, **kept)

    def _negative(self, conditioner: Conditioner, canvas: Canvas) -> Condition:
        negatives = self.negatives or [None] * len(self.inputs)
        there = [i for i, each in enumerate(negatives) if each is not None]
        if not there:
            return conditioner.empty(len(negatives))
        pictures = (None if x is None else x[there] for x in (canvas.image, canvas.mask))
        given = conditioner.read(
            conditioner.with_pictures([negatives[i] for i in there], *pictures), self.reading.negative()
        )
        if len(there) == len(negatives):
            return given
        order = [there.index(i) if i in there else len(there) for i in range(len(negatives))]
        return Condition.cat([given, conditioner.empty(1)])[torch.tensor(order)]

    def warn_of_cuts(self, conditioner: Conditioner) -> None:
        """Warns of each prompt that loses its end."""
        captions = [*self.inputs, *(each for each in self.negatives or () if each is not None)]
        for caption, tokens in dict.fromkeys(conditioner.truncated_captions(captions, self.reading)):
            more = "; long_prompts=True reads all of it" if conditioner.reads_prompts else ""
            warnings.warn(f"only the first {tokens} tokens count of: {caption:.200}{more}", PromptCut, stacklevel=4)


def negative_list(negative: Any, count: int, guidance: float, takes_inputs: bool = True) -> list | None:
    """A negative input for each of `count` pictures: N, or one for all. Raises ValueError where it would do nothing."""
    if negative is None:
        return None
    if not takes_inputs:
        raise ValueError(f"negative={negative!r:.80}: this model is unconditional; there is nothing to guide away from")
    if guidance == 1:
        raise ValueError(f"negative={negative!r:.80} does nothing without guidance, which is 1; raise it")
    found = list(negative) if isinstance(negative, list | tuple) else [negative] * count
    if len(found) != count:
        raise ValueError(f"{len(found)} negative inputs for {count} pictures; give one each, or a single one for all")
    return found
