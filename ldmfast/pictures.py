"""Pictures as people have them (PIL, files, grids, tensors) and as networks do: [N, 3, H, W] in [-1, 1].

One rule for every picture that comes in, from a collection, to begin at, or as a mask (`rgb`, `grey`): the first of
several in a file, turned upright as its EXIF says; 16-bit values scaled to 8 bits; what is transparent laid on white,
in a mask on black (white is where to draw, and what is not there is not to be drawn).
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from PIL import Image, ImageOps

from ldmfast.files import first_line, replacing

if TYPE_CHECKING:  # a command reads the pictures that it was given before it waits for torch
    import torch

Images: TypeAlias = "Image.Image | torch.Tensor | Sequence[Image.Image | torch.Tensor]"  # of a call: one for all, or N
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


def read(path: str | Path, convert: Callable[[Image.Image, str], Image.Image] | None = None) -> Image.Image:
    """The picture in a file as `convert` makes it: `rgb` unless given, or `grey`.

    Raises FileNotFoundError, and ValueError naming a file that is no picture, is damaged or is a decompression bomb.
    """
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            with Image.open(path) as picture:
                found = (convert or rgb)(picture, str(path))
    except FileNotFoundError:
        raise
    except MemoryError as error:  # a PNG of 90 bytes may say that 4 GB follow
        raise ValueError(f"{path} does not fit into memory: it is damaged or too large") from error
    except Exception as error:  # on damaged files Pillow's readers raise what their parsing comes upon
        raise ValueError(f"{path} is not a picture that can be read: {first_line(error)}") from error
    for each in said:  # Pillow's, which leave out which file it was
        warnings.warn(f"{path}: {each.message}", each.category, stacklevel=2)
    return found


def rgb(picture: Image.Image, name: str = "the picture") -> Image.Image:
    """Any PIL picture as RGB of 8 bits, upright, what is transparent laid on white.

    Integers and floats that have no range of their own (modes I and F) are taken to run to the least of 1 (floats
    alone), 255 and 65535 that holds them all. Raises ValueError naming `name` for values beyond.
    """
    return _opaque(picture, "white", "RGB", name)


def grey(picture: Image.Image, name: str = "the picture") -> Image.Image:
    """As `rgb`, for masks: L, what is transparent laid on black."""
    return _opaque(picture, "black", "L", name)


def _opaque(picture, ground, mode, name):
    picture = _eight_bits(ImageOps.exif_transpose(picture), picture.format, name)
    try:
        if picture.has_transparency_data:
            picture = (picture.convert("LA") if picture.mode == "La" else picture).convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, ground), picture)
        return picture.convert(mode)
    except ValueError as error:
        raise ValueError(f"{name}: {first_line(error)}") from error


def _eight_bits(picture, kind, name):
    """16-bit, 32-bit and float grey scaled to L, or LA where one value is transparent; others as they are.

    kind  the file format: Pillow reads 16 bits of PNG and PPM as mode I, too
    """
    if picture.mode not in ("I", "F") and not picture.mode.startswith("I;16"):
        return picture
    values, transparent = np.asarray(picture), picture.info.get("transparency")
    ranges = (1, 255, 65535) if picture.mode == "F" else (255, 65535)
    if picture.mode.startswith("I;16") or kind in ("PNG", "PPM"):
        ranges = (65535,)
    low, high = (values.min(), values.max()) if values.size else (0, 0)
    full = next((most for most in ranges if low >= 0 and high <= most), None)
    if full is None:
        raise ValueError(
            f"{name}: its values run from {low:.4g} to {high:.4g} (mode {picture.mode}), expected 0 to "
            f"{' or '.join(map(str, ranges))}"
        )
    scaled = Image.fromarray(np.rint(values * np.float32(255 / full)).astype(np.uint8))
    if transparent is None:
        return scaled
    return Image.merge("LA", (scaled, Image.fromarray((values != transparent).astype(np.uint8) * 255)))


def picture_tensor(picture, name="image"):
    """A PIL picture, or a tensor [3, H, W] in [-1, 1], as the latter. Raises TypeError or ValueError naming `name`."""
    import torch

    if isinstance(picture, Image.Image):
        array = np.asarray(rgb(picture, name), dtype=np.float32)
        return torch.from_numpy(array / 127.5 - 1).permute(2, 0, 1)
    _require_tensor(picture, name, 3)
    if picture.numel() and (picture.min() < -1.001 or picture.max() > 1.001):
        raise ValueError(f"{name} has values from {picture.min():.3g} to {picture.max():.3g}, expected -1 to 1")
    return picture.float()


def mask_tensor(mask, name="mask"):
    """A PIL picture (white where to draw) or a tensor [1, H, W] in [0, 1], as zeros and ones [1, H, W]."""
    import torch

    if isinstance(mask, Image.Image):
        values = torch.from_numpy(np.asarray(grey(mask, name), dtype=np.float32) / 255)[None]
    else:
        _require_tensor(mask, name, 1)
        values = mask.float()
    values = (values >= 0.5).float()
    if not values.any():
        raise ValueError(f"{name} is empty: it is black everywhere, and white is where to draw")
    return values


def _require_tensor(value, name, channels):
    import torch

    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}, expected a PIL picture or a tensor [{channels}, H, W]")
    if value.ndim != 3 or value.shape[0] != channels:
        raise ValueError(f"{name} has shape {list(value.shape)}, expected [{channels}, H, W]")


def for_each(value, convert, count, name):
    """One picture for all, or `count` of them -> a tensor [count, c, H, W]. Raises ValueError if they do not fit."""
    import torch

    several = isinstance(value, list | tuple) or (isinstance(value, torch.Tensor) and value.ndim == 4)
    tensors = [convert(each, name) for each in (value if several else [value])]
    sizes = {tuple(t.shape[1:]) for t in tensors}
    if len(sizes) > 1:
        raise ValueError(f"{name}: the pictures differ in size: {', '.join(f'{w}x{h}' for h, w in sorted(sizes))}")
    if several and len(tensors) != count:
        raise ValueError(f"{len(tensors)} pictures as {name} for {count} inputs; give one each, or a single one")
    return torch.stack(tensors).expand(count, -1, -1, -1)


def to_pil(x):
    """Pictures [N, 3, H, W] in [-1, 1] (clamped) to N PIL pictures."""
    import torch

    pixels = ((x.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    return [Image.fromarray(p.permute(1, 2, 0).cpu().numpy()) for p in pixels]


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[Callable[[Image.Image], None]]:
    """Context giving `write(picture)`. That the path can be written is tried before any work is done.

    Raises ValueError for an unknown suffix, OSError for a path that cannot be written.
    """
    path = Path(path)
    kind = FORMATS.get(path.suffix.lower())
    if kind is None:
        raise ValueError(f"{path}: a picture's name ends in {', '.join(FORMATS)}")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give a file name")
    with replacing(path) as partial:
        yield lambda picture: picture.save(partial, format=kind)


def grid(pictures, columns=None, scale=1, gap=4):
    """N pictures of one size in rows; `scale` enlarges each, with Lanczos' filter. One comes back without a margin."""
    columns = min(len(pictures), columns or math.ceil(math.sqrt(len(pictures))))
    width, height = (side * scale for side in pictures[0].size)
    rows = math.ceil(len(pictures) / columns)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for i, picture in enumerate(pictures):
        place = (i % columns * (width + gap), i // columns * (height + gap))
        sheet.paste(picture if scale == 1 else picture.resize((width, height), Image.LANCZOS), place)
    return sheet
