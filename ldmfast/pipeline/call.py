"""What a call of the pipeline asks for, checked before anything is computed."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from torch import nn

from ldmfast.diffusion.sampling import check_eta
from ldmfast.pictures import Images, for_each, mask_tensor, picture_tensor

STRENGTH = 0.8  # from an image, where a call names none


@dataclass(frozen=True)
class SamplingOptions:
    """How to sample. Raises ValueError naming the argument that is wrong.

    guidance  1: none.    rescale  0 to 1.    eta  0 to 1
    strength  how much of the schedule is run: its last int(steps * strength) steps
    """

    scheduler: diffusers.SchedulerMixin
    steps: int
    guidance: float = 1.0
    rescale: float = 0.0
    eta: float = 0.0
    strength: float = 1.0

    def __post_init__(self) -> None:
        longest = self.scheduler.config.num_train_timesteps
        if not 1 <= self.steps <= longest:
            raise ValueError(f"steps={self.steps} must lie between 1 and {longest}")
        if not 0 <= self.guidance < math.inf:
            raise ValueError(f"guidance={self.guidance} must be a finite number, 0 or more")
        for name, value in (("guidance_rescale", self.rescale), ("eta", self.eta)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name}={value} must lie between 0 and 1")
        check_eta(self.scheduler, self.eta)
        if not 0 < self.strength <= 1:
            raise ValueError(f"strength={self.strength} must lie between 0 and 1, and above 0")
        if not int(self.steps * self.strength):
            raise ValueError(f"strength={self.strength} of {self.steps} steps is less than one step; raise either")

    @property
    def skipped(self) -> int:
        """How many of the first steps are left out."""
        return self.steps - int(self.steps * self.strength)

    @property
    def guided(self) -> bool:
        return self.guidance != 1


@dataclass(frozen=True)
class Canvas:
    """What is drawn on.

    size   (height, width) of the latents
    image  [N, 3, H, W] in [-1, 1] or None: where to begin, or what stays around the mask
    mask   [N, 1, H, W] of zeros and ones or None: ones are repainted
    """

    size: tuple[int, int]
    image: torch.Tensor | None = None
    mask: torch.Tensor | None = None

    def __getitem__(self, part: slice) -> Canvas:
        return Canvas(self.size, *(None if x is None else x[part] for x in (self.image, self.mask)))

    def latent_mask(self) -> torch.Tensor:
        """[N, 1, h, w]: a latent is repainted if any of its pixels is."""
        return F.adaptive_max_pool2d(self.mask, self.size)

    def paste(self, drawn: torch.Tensor) -> torch.Tensor:
        """The drawn pictures [N, 3, H, W] with the image's own pixels outside of the mask."""
        return drawn if self.mask is None else torch.where(self.mask > 0, drawn, self.image)


def make_canvas(
    count: int,
    trained: tuple[int, int],
    factor: int,
    *,
    size: tuple[int, int] | None = None,
    image: Images | None = None,
    mask: Images | None = None,
    enlarged: bool = False,
) -> Canvas:
    """The Canvas of `count` pictures. Raises ValueError for sizes that do not fit each other or the autoencoder.

    trained   (height, width) of the latents that the model was trained on
    factor    pixels of a picture to one of its latents, along a side
    size      (width, height) in pixels, or None
    enlarged  the image is of the latents' size, not of the pictures': super-resolution
    """
    if mask is not None and image is None:
        raise ValueError("mask is given without image: there is nothing to keep around it")
    if image is not None:
        image = for_each(image, picture_tensor, count, "image")
    if mask is not None:
        mask = for_each(mask, mask_tensor, count, "mask")
        if mask.shape[2:] != image.shape[2:]:
            raise ValueError(f"mask is {_size(mask)} pixels, image is {_size(image)}; they must be of one size")
    if size is not None:
        height, width = size[1], size[0]
    elif image is not None:
        height, width = (side * (factor if enlarged else 1) for side in image.shape[2:])
    else:
        return Canvas(trained)
    if min(height, width) < 1 or height % factor or width % factor:
        raise ValueError(f"size {width}x{height}: both sides must be multiples of {factor}, and above 0")
    expected = (height // factor, width // factor) if enlarged else (height, width)
    if image is not None and tuple(image.shape[2:]) != expected:
        wanted = f"{expected[1]}x{expected[0]}"
        raise ValueError(f"image is {_size(image)} pixels; for size {width}x{height} it must be {wanted}")
    return Canvas((height // factor, width // factor), image, mask)


def _size(x):
    return f"{x.shape[3]}x{x.shape[2]}"


def check_channels(unet: nn.Module, vae: nn.Module, concat: torch.Tensor | None, canvas: Canvas) -> None:
    """Raises ValueError if the U-Net cannot take the latents with `concat` [N, c, h, w] or None beside them."""
    own, joined = vae.config.latent_channels, 0 if concat is None else concat.shape[1]
    if own + joined != unet.config.in_channels:
        raise ValueError(
            f"this U-Net takes {unet.config.in_channels} channels; the latents have {own} and the condition beside "
            f"them {joined}"
        )
    if joined and tuple(concat.shape[2:]) not in ((1, 1), tuple(canvas.size)):
        (h, w), (height, width) = concat.shape[2:], canvas.size
        raise ValueError(f"the condition beside the latents is {w}x{h}, the latents are {width}x{height}")


def listed(inputs: Any, takes_inputs: bool = True) -> list:
    """The N inputs of a call: a list, or one input; for an unconditional model also their number.

    Raises ValueError for none, or for an empty caption.
    """
    if not takes_inputs and (inputs is None or isinstance(inputs, int)):
        inputs = [None] * (1 if inputs is None else inputs)
    inputs = list(inputs) if isinstance(inputs, list | tuple) else [inputs]
    captions = [i.get("text", "-") if isinstance(i, dict) else i for i in inputs]
    if not inputs or any(isinstance(c, str) and not c.strip() for c in captions):
        raise ValueError("the prompt is empty: say what to draw, as in 'a red apple on a yellow background'")
    return inputs


def strength_of(strength: float | None, image: Images | None, mask: Images | None, taken: tuple[str, ...]) -> float:
    """How much of the schedule is run; None: 0.8 from an image, else all of it. Raises ValueError.

    taken  which of image and mask the model takes beside the latent
    """
    for name, value in (("image", image), ("mask", mask)):
        if name in taken and value is None:
            raise ValueError(f"{name} is missing: this model takes {' and '.join(taken)} beside the latent")
    if taken == ("image",) and (strength is not None or mask is not None):
        raise ValueError("strength and mask belong to models that begin at an image; this one enlarges it")
    if strength is not None and image is None:
        raise ValueError(f"strength={strength} is given without image")
    if strength is None:
        return 1.0 if image is None or mask is not None or taken else STRENGTH
    return strength


def seed_list(seeds: int | Sequence[int], count: int) -> list[int]:
    """A seed for each of `count` pictures: `seeds` itself, or seeds, seeds + 1, ... Raises ValueError."""
    seeds = list(range(seeds, seeds + count)) if isinstance(seeds, numbers.Integral) else list(seeds)
    if len(seeds) != count:
        raise ValueError(f"{len(seeds)} seeds for {count} inputs; give one seed an input, or a single number")
    if any(not 0 <= seed < 2**63 for seed in seeds):
        raise ValueError("seeds must lie between 0 and 2**63 - 1")
    return seeds
