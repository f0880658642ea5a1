"""The colours of a semantic map: which class each stands for, and maps in other colours."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

NEAR = 10.0  # in RGB: what a JPEG makes of a palette's colour is still that colour
RIM = 0.02  # the share of pixels of other colours that the rims of smoothed shapes have


def hex_of(colour: Sequence[float]) -> str:
    """(255, 0, 16) -> "#ff0010"."""
    return "#" + "".join(f"{round(channel):02x}" for channel in colour)


def described(names: Sequence[str], palette: Sequence[Sequence[float]]) -> str:
    """ "red ground #de4c4a, dog #8c3f3f, ..." """
    return ", ".join(f"{name} {hex_of(colour)}" for name, colour in zip(names, palette, strict=True))


def check_colours(picture: Image.Image, name: str, names: Sequence[str], palette: Sequence[Sequence[float]]) -> str:
    """What is to be said of a map's colours: "" for those of the palette. RGB in.

    Raises ValueError with the palette where more than a shape's smoothed rims is in other colours.
    """
    pixels, counts = np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0, return_counts=True)
    gaps = np.linalg.norm(pixels[:, None].astype(np.float32) - np.asarray(palette, dtype=np.float32), axis=2).min(
        axis=1
    )
    strange = gaps > NEAR
    if not strange.any():
        return ""
    share, worst = counts[strange].sum() / counts.sum(), pixels[strange][counts[strange].argmax()]
    if share > RIM:
        raise ValueError(
            f"{name}: {100 * share:.0f} % of its pixels have no colour of the palette, most of them {hex_of(worst)}; "
            f"the palette: {described(names, palette)}"
        )
    return f"{name}: {100 * share:.1f} % of its pixels have no colour of the palette; the nearest counts"
