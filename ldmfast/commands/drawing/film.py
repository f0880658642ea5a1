"""The steps of a picture in a row: what was predicted after each few of them, and the picture itself last."""

from __future__ import annotations

from PIL import Image

from ldmfast.pictures import grid

FRAMES = 8


class Film:
    """Takes what `on_preview` gives, and makes a strip of at most FRAMES frames of the first picture of each batch."""

    def __init__(self, steps: int) -> None:
        self.every = max(1, steps // (FRAMES - 1))
        self.frames: list[Image.Image] = []
        self.finished = False

    def take(self, step: int, steps: int, pictures: list[Image.Image]) -> None:
        """The predicted pictures after `step` of `steps`; those of a second batch are left out."""
        if self.frames and step <= self.last:
            self.finished = True
        if not self.finished and step % self.every == 0 and len(self.frames) < FRAMES - 1:
            self.frames.append(pictures[0])
            self.last = step

    def strip(self, result: Image.Image, scale: int = 1) -> Image.Image:
        return grid([*self.frames, result], len(self.frames) + 1, scale)
