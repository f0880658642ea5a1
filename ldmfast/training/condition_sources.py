"""What each picture's denoiser can be told, and what it is told in a step."""

from dataclasses import dataclass

import torch

from ldmfast.conditioning.base import Condition, Conditioner, Unconditional
from ldmfast.conditioning.classes_and_boxes import ClassEmbedder
from ldmfast.conditioning.text import TOKENS, TextEncoder
from ldmfast.conditioning.transformer import TransformerText


def texts(row):
    """A row of metadata.jsonl -> the captions that describe it, the plainest first."""
    return row["texts"]


def nothing(row):
    return [None]


def make(config, rows):
    """(conditioner, the function from a row to the inputs that describe it) that config.condition names.

    Raises ValueError naming the row that has no class.
    """
    if config.condition == "text":
        return TextEncoder.from_pretrained(config.text_encoder), texts
    torch.manual_seed(config.seed)
    if config.condition == "transformer":
        return TransformerText(config.width, layers=config.text_layers, tokens=TOKENS, heads=4, head_width=32), texts
    if config.condition == "class":
        key = config.class_key
        bare = next((row["file_name"] for row in rows if not isinstance(row.get(key), str)), None)
        if bare:
            raise ValueError(f"{bare} has no {key!r} in metadata.jsonl; --class-key names the field with the class")
        return ClassEmbedder(sorted({row[key] for row in rows}), config.width), lambda row: [row[key]]
    return Unconditional(), nothing


@dataclass(frozen=True)
class Told:
    """N pictures, each described by one or more inputs; a frozen conditioner's answers are computed once."""

    conditioner: Conditioner
    inputs: list  # M distinct inputs, those of a picture one after another
    first: torch.Tensor  # [N] index into inputs of a picture's first one
    count: torch.Tensor  # [N] how many it has
    conditions: Condition | None  # of M inputs, on the CPU; None where the conditioner is trained
    nothing: Condition | None  # of 1: what guidance dropout puts in their place

    def draw(self, index, config, draw):
        """The Condition of the pictures `index` [B], some of them told nothing, on the draw's device."""
        plain, other, dropped = draw.uniform(3).unbind(1)
        other = torch.where(plain < config.plain_captions, 0, (other * self.count[index]).long())
        chosen, dropped = self.first[index] + other, dropped < config.guidance_dropout
        if self.conditions is None:
            condition = self.conditioner([self.inputs[i] for i in chosen.tolist()])
            return condition.dropped(dropped, self.conditioner.empty(1))
        if not self.conditions.parts():
            return self.conditions
        return self.conditions[chosen].dropped(dropped, self.nothing).to(draw.device, torch.float32)

    def sheet(self, count):
        """A pipeline's arguments for `count` samples: inputs spread evenly over those trained on."""
        return dict(inputs=[self.inputs[i] for i in torch.linspace(0, len(self.inputs) - 1, count).long().tolist()])


@torch.no_grad()
def gather(conditioner, described, device="cpu"):
    """`described` lists for each picture the inputs that describe it. States are kept in half precision."""
    inputs, start = [], {}
    for each in described:
        key = tuple(map(repr, each))
        if key not in start:
            start[key] = len(inputs)
            inputs.extend(each)
    first = torch.tensor([start[tuple(map(repr, each))] for each in described])
    count = torch.tensor([len(each) for each in described])
    if conditioner.trainable:
        return Told(conditioner, inputs, first, count, None, None)
    conditioner.to(device)
    conditions, empty = (c.to("cpu", torch.float16) for c in (conditioner(inputs), conditioner.empty(1)))
    return Told(conditioner, inputs, first, count, conditions, empty)
