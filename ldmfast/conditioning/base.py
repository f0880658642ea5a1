"""`Conditioner`, the base of the encoders of what a denoiser is conditioned on.

A `Conditioner` maps a list of inputs (captions, classes, boxes, maps, pictures) to a `Condition`; a `Condition` knows
how to call the U-Net. The encoders stand beside this file.
The modes are Rombach et al. 2022's: none, concat, crossattn, hybrid (both), adm (a label beside the timestep).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ldmfast import conditioning, files
from ldmfast.conditioning.condition import Condition

if TYPE_CHECKING:
    from ldmfast.conditioning.text_weights import PromptReading

MODES = ("none", "concat", "crossattn", "hybrid", "adm")
CONFIG, WEIGHTS = "config.json", "model.safetensors"


class Conditioner(nn.Module):
    """Base of the encoders: `encoder(inputs)` and `encoder.empty(n)` give a Condition.

    mode       one of MODES
    trainable  whether its parameters are trained with the denoiser (and its forward is differentiated)
    settings   the constructor's arguments, which config.json keeps
    option     the command-line option that its inputs come from: "class", "boxes" or "map"; None for others
    takes_inputs     whether an input says anything; else there is no prompt, and nothing to guide towards
    takes_pictures   what of a pipeline's image and mask it is conditioned on: ("image",), ("image", "mask") or ()
    reads_prompts    whether `read` takes a PromptReading: its text encoder is CLIP's
    enlarges         whether that image is of the latents' size, not of the pictures': super-resolution
    """

    mode = "none"
    option: str | None = None
    takes_inputs = True
    takes_pictures: tuple[str, ...] = ()
    enlarges = False
    trainable = False
    reads_prompts = False

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.settings = settings

    def forward(self, inputs: list) -> Condition:
        """A list of N inputs -> a Condition of N. Raises ValueError saying which input is wrong and why."""
        raise NotImplementedError

    def empty(self, n: int) -> Condition:
        """The unconditional condition, n times: for guidance and its dropout."""
        raise NotImplementedError

    def read(self, inputs: list, reading: PromptReading | None = None) -> Condition:
        """As `forward`, with prompts read as a call asks. Raises ValueError where that is not for this encoder."""
        if reading is not None and (asked := reading.asked()):
            raise ValueError(
                f"{asked[0]} is for models whose text encoder is CLIP's; this one's is {type(self).__name__}"
            )
        return self(inputs)

    def complete(self, inputs: list, seeds: list[int]) -> list:
        """The inputs of N pictures with what they leave open drawn, each by its picture's seed; here nothing is."""
        return inputs

    def truncated_captions(self, inputs: list, reading: PromptReading | None = None) -> list[tuple[str, int]]:
        """(caption, tokens that are read of it) of the captions that are longer than what is read."""
        return []

    def by_option(self) -> dict[str, Conditioner]:
        """{option: the conditioner that takes it}, of this one or of its members."""
        return {self.option: self} if self.option else {}

    def as_inputs(self, rows: list[dict]) -> list:
        """The inputs of N pictures from {option: value} of each."""
        return [next(iter(row.values())) for row in rows]

    def bind(self, vae: nn.Module) -> Conditioner:
        """Name the AutoencoderKL or VQModel that encodes pictures, where one is needed. Returns self."""
        return self

    def with_pictures(self, inputs: list, images: torch.Tensor | None, masks: torch.Tensor | None) -> list:
        """The inputs of N pictures with a call's image [N, 3, H, W] and mask [N, 1, H, W] put where they are taken."""
        return inputs

    @property
    def device(self) -> torch.device:
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Write config.json, and model.safetensors if there are weights of its own (in `dtype`).

        Raises ValueError for an encoder out of a single file: it is saved by its name, and a file is not enough.
        """
        folder, name = Path(folder), self.settings.get("name")
        if name and Path(name).is_file():
            raise ValueError(f"{name} holds this {type(self).__name__}; convert it to a folder first (ldmfast convert)")
        folder.mkdir(parents=True, exist_ok=True)
        settings = {"_class_name": type(self).__name__, **self.settings}
        files.write_text(folder / CONFIG, json.dumps(settings, indent=2) + "\n")
        weights = self.own_weights()
        if weights:
            cast = {k: v.to(dtype) if dtype and v.is_floating_point() else v for k, v in weights.items()}
            with files.replacing(folder / WEIGHTS) as partial:
                save_file({k: v.detach().cpu().contiguous() for k, v in cast.items()}, partial)

    def own_weights(self) -> dict[str, torch.Tensor]:
        """The state that is saved; an encoder that is frozen and known by name has none."""
        return self.state_dict()

    @classmethod
    def from_settings(cls, settings: dict) -> Conditioner:
        return cls(**settings)

    @classmethod
    def load(cls, folder: Path, settings: dict, dtype: torch.dtype | None = None) -> Conditioner:
        """From the folder and the settings that its config.json holds; `load_conditioner` finds the class."""
        model = cls.from_settings(settings)
        if wanted := model.own_weights():
            found = _read(folder / WEIGHTS)
            if odd := sorted(set(wanted) ^ set(found)):
                raise ValueError(f"{folder / WEIGHTS} is another {cls.__name__}'s: only one of them has {odd[0]}")
            try:
                model.load_state_dict({**model.state_dict(), **found})
            except RuntimeError as error:
                reason = files.first_line(str(error).splitlines()[-1])  # torch's first line names the class alone
                raise ValueError(f"{folder / WEIGHTS} does not fit {CONFIG}: {reason}") from error
        return model.to(dtype) if dtype else model


def load_conditioner(folder: str | Path, *, dtype: torch.dtype | None = None) -> Conditioner:
    """Read what `save_pretrained` wrote. Raises FileNotFoundError or ValueError naming the file."""
    folder = Path(folder)
    known, settings = conditioning.CONDITIONERS, files.read_json(folder / CONFIG)
    try:
        name = settings.pop("_class_name")
        if name not in known:
            raise KeyError(name)
    except KeyError as error:
        raise ValueError(f"{folder / CONFIG} describes no conditioner of {', '.join(known)}: {error}") from error
    return getattr(conditioning, name).load(folder, settings, dtype)


def _read(path):
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: the conditioner's weights")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} could not be loaded: {error}") from error


class Unconditional(Conditioner):
    """Mode "none": an empty condition, whatever the inputs are."""

    takes_inputs = False

    def forward(self, inputs: list) -> Condition:
        return Condition()

    def empty(self, n: int) -> Condition:
        return Condition()
