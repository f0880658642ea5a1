"""Pictures as conditions: a denoiser that is told its own picture masked (inpainting) or small (super-resolution)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ldmfast.conditioning.spatial import LowResolution, MaskedImage, PictureConditioner
from ldmfast.data.collection import Pictures
from ldmfast.training.step import Draw

LEAST, MOST = 0.25, 0.75  # a mask's sides, in parts of the picture's


def make(kind, channels):
    """The conditioner of `kind`, "inpainting" or "super-resolution", for latents of `channels` channels."""
    return MaskedImage(channels + 1) if kind == "inpainting" else LowResolution()


@dataclass(frozen=True)
class Shown:
    """What a step is told of each picture, made of the picture itself; nothing is dropped: guidance has no use for it.

    factor  pixels of a picture to one of its latent, along a side
    """

    conditioner: PictureConditioner
    pictures: Pictures
    factor: int

    def draw(self, index, config, draw):
        """The Condition of the pictures `index` [B], on the draw's device."""
        x = self.pictures.batch(index).to(draw.device)
        if isinstance(self.conditioner, MaskedImage):
            pairs = zip(x, rectangles(draw, x.shape[2:]), strict=True)
            return self.conditioner([{"image": image, "mask": mask} for image, mask in pairs])
        return self.conditioner(list(F.avg_pool2d(x, self.factor)))

    def sheet(self, count):
        """A pipeline's arguments for `count` samples: pictures spread evenly over the collection."""
        x = self.pictures.batch(torch.linspace(0, len(self.pictures) - 1, count).long())
        if isinstance(self.conditioner, MaskedImage):
            masks = rectangles(Draw(0, 0, 0, count), x.shape[2:])
            return dict(inputs=[None] * count, image=list(x), mask=list(masks))
        return dict(inputs=[None] * count, image=list(F.avg_pool2d(x, self.factor)))


def rectangles(draw, size):
    """Masks [B, 1, H, W], 1 in a rectangle drawn at random: what is to be painted.   size  (H, W)"""
    sides, places = LEAST + (MOST - LEAST) * draw.uniform(2), draw.uniform(2)
    low = places * (1 - sides)
    inside = []
    for axis, length in enumerate(size):
        centre = (torch.arange(length) + 0.5) / length
        begin = low[:, axis, None]
        inside.append((centre >= begin) & (centre < begin + sides[:, axis, None]))  # [B, length]
    return (inside[0][:, None, :, None] & inside[1][:, None, None, :]).float().to(draw.device)
