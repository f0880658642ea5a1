"""`Hybrid`: several conditioners at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from ldmfast import files
from ldmfast.conditioning.base import CONFIG, Conditioner, load_conditioner
from ldmfast.conditioning.condition import Condition, side_by_side

if TYPE_CHECKING:
    from ldmfast.conditioning.text_weights import PromptReading


class Hybrid(Conditioner):
    """Several conditioners at once, as {name: conditioner}; an input is a dict with some of the names.

    Contexts are joined along the tokens, concats along the channels, in the members' order; a label may come from one
    of them only. A name that an input lacks is empty for that picture.
    """

    mode = "hybrid"

    def __init__(self, **members: Conditioner) -> None:
        super().__init__()
        self.members = nn.ModuleDict(members)

    @property
    def trainable(self) -> bool:
        return any(m.trainable for m in self.members.values())

    @property
    def takes_inputs(self) -> bool:
        return any(m.takes_inputs for m in self.members.values())

    @property
    def reads_prompts(self) -> bool:
        return any(m.reads_prompts for m in self.members.values())

    @property
    def takes_pictures(self) -> tuple[str, ...]:
        found = self._of_pictures()
        return found[1].takes_pictures if found else ()

    @property
    def enlarges(self) -> bool:
        return any(m.enlarges for m in self.members.values())

    def forward(self, inputs: list) -> Condition:
        return self.read(inputs)

    def read(self, inputs: list, reading: PromptReading | None = None) -> Condition:
        for i, value in enumerate(inputs):
            if not isinstance(value, dict) or set(value) - set(self.members):
                raise ValueError(f"Hybrid: input {i} must be a dict with {', '.join(self.members)}; got {value!r:.80}")
        taken = {
            name: reading if m.reads_prompts or not self.reads_prompts else None for name, m in self.members.items()
        }
        return side_by_side([_condition_of(m, name, inputs, taken[name]) for name, m in self.members.items()])

    def empty(self, n: int) -> Condition:
        return side_by_side([m.empty(n) for m in self.members.values()])

    def truncated_captions(self, inputs: list, reading: PromptReading | None = None) -> list[tuple[str, int]]:
        if found := self._of_pictures():
            inputs = [value if isinstance(value, dict) else {self._beside(found[0]): value} for value in inputs]
        dicts = [value for value in inputs if isinstance(value, dict)]  # forward refuses the others
        by_name = {name: [value[name] for value in dicts if name in value] for name in self.members}
        found = (member.truncated_captions(by_name[name], reading) for name, member in self.members.items())
        return [long for each in found for long in each]

    def by_option(self) -> dict[str, Conditioner]:
        return {name: member for name, member in self.members.items() if name == member.option}

    def as_inputs(self, rows: list[dict]) -> list:
        return rows

    def bind(self, vae: nn.Module) -> Hybrid:
        for member in self.members.values():
            member.bind(vae)
        return self

    def with_pictures(self, inputs: list, images: torch.Tensor | None, masks: torch.Tensor | None) -> list:
        """An input that is no dict is the first other member's."""
        found = self._of_pictures()
        if found is None:
            return inputs
        name, member = found
        pictures = member.with_pictures([None] * len(inputs), images, masks)
        inputs = [value if isinstance(value, dict) else {self._beside(name): value} for value in inputs]
        return [{**value, name: picture} for value, picture in zip(inputs, pictures, strict=True)]

    def _beside(self, name: str) -> str:
        """The first other member's name."""
        return next(n for n in self.members if n != name)

    def _of_pictures(self) -> tuple[str, Conditioner] | None:
        """The name of the member that takes pictures, and itself."""
        return next((pair for pair in self.members.items() if pair[1].takes_pictures), None)

    def complete(self, inputs: list, seeds: list[int]) -> list:
        """An input for a member that `stands_for` another is drawn as that one's."""
        stand_ins = {name: m for name, m in self.members.items() if hasattr(m, "stands_for")}
        return [self._completed(value, seed, stand_ins) for value, seed in zip(inputs, seeds, strict=True)]

    @staticmethod
    def _completed(value, seed, stand_ins):
        given = [name for name in stand_ins if isinstance(value, dict) and name in value]
        for name in given:
            other = stand_ins[name].stands_for
            if other in value:
                raise ValueError(f"Hybrid: {name} is drawn as {other}, and this input has both; give one of them")
            value = {k: v for k, v in value.items() if k != name} | {other: stand_ins[name].draw(value[name], seed)}
        return value

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        for name, member in self.members.items():
            member.save_pretrained(Path(folder, name), dtype=dtype)
        settings = {"_class_name": "Hybrid", "members": list(self.members)}
        files.write_text(Path(folder, CONFIG), json.dumps(settings, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path, settings: dict, dtype: torch.dtype | None = None) -> Hybrid:
        return cls(**{name: load_conditioner(folder / name, dtype=dtype) for name in settings["members"]})


def _condition_of(member, name, inputs, reading):
    """The member's condition, empty where an input lacks `name`."""
    there = [value[name] for value in inputs if name in value]
    if len(there) == len(inputs) or not there:
        return member.read(there, reading) if there else member.empty(len(inputs))
    rows = iter(range(len(there)))
    order = [next(rows) if name in value else len(there) for value in inputs]
    return Condition.cat([member.read(there, reading), member.empty(1)])[order]
