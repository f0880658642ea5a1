"""Where a training step's conditions come from: inputs that describe the pictures, or the pictures themselves.

Both sources have `conditioner`, `conditions_of(index, step)` and `sheet(count)`.
"""

import functools
import hashlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ldmfast.conditioning import Condition, Conditioner, Unconditional
from ldmfast.conditioning.classes_and_boxes import ClassEmbedder
from ldmfast.conditioning.spatial import LowResolution, MaskedImage, PictureConditioner
from ldmfast.conditioning.text import TOKENS, TextEncoder
from ldmfast.conditioning.transformer import TransformerText
from ldmfast.data import rows_on_disk
from ldmfast.data.collection import Pictures
from ldmfast.models.encode_decode import downsampling
from ldmfast.training.step import Step

TOGETHER = 1024  # inputs that a frozen conditioner is asked for at a time: what it answers is kept in half as much
LEAST, MOST = 0.25, 0.75  # a mask's sides, in parts of the picture's


def make(config, pictures, vae, channels, device="cpu", folder=None):
    """The source that config.condition names, for a collection and an autoencoder whose latents have `channels`.

    folder   as of `gather`
    Raises ValueError naming the row that has no class.
    """
    if config.states and config.condition in ("inpainting", "super-resolution"):
        raise ValueError(f"states={config.states}: condition={config.condition} is made anew at every step")
    if config.condition == "inpainting":
        return PictureSource(MaskedImage(channels + 1).bind(vae), pictures, downsampling(vae))
    if config.condition == "super-resolution":
        return PictureSource(LowResolution().bind(vae), pictures, downsampling(vae))
    conditioner, describe = _conditioner(config, pictures.rows)
    return gather(conditioner, map(describe, pictures.rows), config, device, folder, config.states)


def _conditioner(config, rows):
    """(conditioner, the function from a row to the inputs that describe it)."""
    if config.condition == "text":
        return TextEncoder.from_pretrained(config.text_encoder), captions
    torch.manual_seed(config.seed)
    if config.condition == "transformer":
        return TransformerText(config.width, layers=config.text_layers, tokens=TOKENS, heads=4, head_width=32), captions
    if config.condition == "class":
        key = config.class_key
        bare = next((row["file_name"] for row in rows if not isinstance(row.get(key), str)), None)
        if bare:
            hint = "; the folders' names are in 'label'" if all("label" in row for row in rows) else ""
            raise ValueError(
                f"{bare} has no {key!r} in metadata.jsonl; --class-key names the field with the class{hint}"
            )
        return ClassEmbedder(sorted({row[key] for row in rows}), config.width), lambda row: [row[key]]
    return Unconditional(), lambda row: [None]


def captions(row):
    """A row of metadata.jsonl -> the captions that describe it, the plainest first."""
    return row["texts"]


@dataclass(frozen=True)
class InputSource:
    """N pictures, each described by one or more inputs; a frozen conditioner's answers are computed once."""

    conditioner: Conditioner
    inputs: list  # M distinct inputs
    described: torch.Tensor  # indices into inputs: those of a picture one after another
    first: torch.Tensor  # [N] index into `described` of a picture's first one
    count: torch.Tensor  # [N] how many it has
    conditions: Condition | None  # of M inputs, on the CPU; None where the conditioner is trained
    unconditional: Condition | None  # of 1: what guidance dropout puts in their place
    first_share: float  # of the draws that take a picture's first input; the others take any of them
    dropout: float  # share of the draws that are unconditional

    def conditions_of(self, index, step):
        """The Condition of the pictures `index` [B], some of them unconditional, on the step's device."""
        first, other, dropped = step.uniform(3).unbind(1)
        other = torch.where(first < self.first_share, 0, (other * self.count[index]).long())
        chosen, dropped = self.described[self.first[index] + other], dropped < self.dropout
        if self.conditions is None:
            condition = self.conditioner([self.inputs[i] for i in chosen.tolist()])
            return condition.dropped(dropped, self.conditioner.empty(1))
        if not self.conditions.parts():
            return self.conditions
        return self.conditions[chosen].dropped(dropped, self.unconditional).to(step.device, torch.float32)

    def sheet(self, count):
        """A pipeline's arguments for `count` samples: inputs spread evenly over those trained on."""
        return dict(inputs=[self.inputs[i] for i in _spread(len(self.inputs), count).tolist()])


@torch.no_grad()
def gather(conditioner, described, config, device="cpu", folder=None, file=""):
    """An InputSource; a frozen conditioner's states are kept in half precision.

    folder     where they are kept while the process lives, if they are too large for the memory
    described  for each picture the inputs that describe it
    config     its first_input_share and guidance_dropout are read
    file       keeps the states, and is checked if it is there
    Raises ValueError for such a file beside an encoder that is trained, and for one that was made from something else.
    """
    inputs, known, indices, first, count = [], {}, [], [], []
    for each in described:
        first.append(len(indices))
        count.append(len(each))
        for one in each:
            if (key := repr(one)) not in known:
                known[key] = len(inputs)
                inputs.append(one)
            indices.append(known[key])
    conditions = unconditional = None
    if conditioner.trainable and file:
        raise ValueError(f"states={file}: {type(conditioner).__name__} is trained, and what it makes changes")
    if not conditioner.trainable:
        conditions = _answers(conditioner.to(device), inputs, folder, file)
        unconditional = conditioner.empty(1).to("cpu", torch.float16)
    return InputSource(
        conditioner,
        inputs,
        *map(torch.tensor, (indices, first, count)),
        conditions,
        unconditional,
        config.first_input_share,
        config.guidance_dropout,
    )


def _answers(conditioner, inputs, folder, file=""):
    """The Condition of all inputs, on the CPU in half precision, or on the disk in `folder` where it is too large; in
    `file`, if one is named.

    Raises ValueError for one that is written to the disk and whose contexts differ in length.
    """

    @functools.lru_cache(1)  # the first is asked for its shapes, then for its values
    def answer(start):
        return conditioner(inputs[start : start + TOGETHER]).to("cpu", torch.float16)

    def tables():
        parts = answer(0).parts()
        return {name: ((len(inputs), *value.shape[1:]), value.dtype) for name, value in parts.items()}

    def fill(found):
        for start in range(0, len(inputs), TOGETHER):
            for name, value in answer(start).parts().items():
                if value.shape[1:] != found[name].shape[1:]:
                    raise ValueError(
                        f"{len(inputs)} conditions cannot be kept in a file, for they differ in shape: "
                        f"{name} has {list(value.shape[1:])} after {list(found[name].shape[1:])}"
                    )
                found[name].write(start, value)

    if file:
        made_from = {"encoder weights": _encoder_digest(conditioner), "captions": _inputs_digest(inputs)}
        return Condition(**rows_on_disk.kept_or_made(file, "conditions", made_from, tables, fill))
    if folder is None or not rows_on_disk.large(tables()):
        return Condition.cat([answer(start) for start in range(0, len(inputs), TOGETHER)])
    found = rows_on_disk.scratch(folder, tables())
    fill(found)
    return Condition(**found)


def _encoder_digest(conditioner):
    """Of its class, its settings and its weights."""
    settings = {name: value for name, value in conditioner.settings.items() if name != "name"}  # where it was found
    said = f"{type(conditioner).__name__} {sorted(settings.items())!r} "
    return said + rows_on_disk.digest(conditioner.state_dict().values())


def _inputs_digest(inputs):
    return hashlib.sha256("\0".join(map(repr, inputs)).encode()).hexdigest()


@dataclass(frozen=True)
class PictureSource:
    """Pictures conditioned on themselves, masked (inpainting) or small (super-resolution); none is left out, for
    guidance does not apply to them.

    factor  pixels of a picture to one of its latent, along a side
    """

    conditioner: PictureConditioner
    pictures: Pictures
    factor: int

    def conditions_of(self, index, step):
        """The Condition of the pictures `index` [B], on the step's device."""
        x = self.pictures.batch(index).to(step.device)
        if isinstance(self.conditioner, MaskedImage):
            pairs = zip(x, rectangles(step, x.shape[2:]), strict=True)
            return self.conditioner([{"image": image, "mask": mask} for image, mask in pairs])
        return self.conditioner(list(F.avg_pool2d(x, self.factor)))

    def sheet(self, count):
        """A pipeline's arguments for `count` samples: pictures spread evenly over the collection."""
        x = self.pictures.batch(_spread(len(self.pictures), count))
        if isinstance(self.conditioner, MaskedImage):
            masks = rectangles(Step(0, 0, 0, count), x.shape[2:])
            return dict(inputs=[None] * count, image=list(x), mask=list(masks))
        return dict(inputs=[None] * count, image=list(F.avg_pool2d(x, self.factor)))


def _spread(length, count):
    return torch.linspace(0, length - 1, count).long()


def rectangles(step, size):
    """Masks [B, 1, H, W], 1 in a rectangle at a random place: what is to be painted.   size  (H, W)"""
    sides, places = LEAST + (MOST - LEAST) * step.uniform(2), step.uniform(2)
    low = places * (1 - sides)
    inside = []
    for axis, length in enumerate(size):
        centre = (torch.arange(length) + 0.5) / length
        begin = low[:, axis, None]
        inside.append((centre >= begin) & (centre < begin + sides[:, axis, None]))  # [B, length]
    return (inside[0][:, None, :, None] & inside[1][:, None, None, :]).float().to(step.device)
