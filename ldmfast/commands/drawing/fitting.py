"""Pictures, masks and maps as they come, brought to the size that a model draws."""

from __future__ import annotations

from PIL import Image, ImageOps

from ldmfast.pictures import grey, read, rgb

MODEL, ASKED = "the model's size", "the size asked for"
SHAPES = 0.02  # two pictures whose width / height differs by a larger share are of different shapes


def fit_pictures(image: str | None, mask: str | None, size: tuple[int, int], why: str) -> tuple[list, list[str]]:
    """([image, mask] as PIL pictures of `size` or None, what is to be said of it).

    image, mask  files; what does not fit is scaled, after what is too wide or too high was cut off on both sides
    size         (width, height) in pixels
    why          what the size is: "the model's size"
    Raises ValueError for a mask of another shape than the image, and what `read` raises.
    """
    picture = None if image is None else read(image, rgb)
    area = None if mask is None else read(mask, grey)
    if picture is not None and area is not None:
        _check_shapes(mask, area, image, picture)
    said = []
    if picture is not None and picture.size != size:
        said.append(_said(image, picture.size, size, why))
    if area is not None and area.size != size and (picture is None or area.size != picture.size):
        said.append(_said(mask, area.size, size, why))
    return [picture and _scaled(picture, size), area and fit_mask(area, size)], said


def unfitted(image: str | None, mask: str | None) -> list:
    """[image, mask] as they are."""
    return [image and read(image, rgb), mask and read(mask, grey)]


def fit_mask(mask: Image.Image, size: tuple[int, int]) -> Image.Image:
    """A mask (mode L) scaled: a pixel is white where any of those that it stands for is, so that no line is lost."""
    if mask.size == size:
        return mask
    sharp = mask.point(lambda value: 255 * (value >= 128))
    return ImageOps.fit(sharp, size, method=Image.BOX).point(lambda value: 255 * (value > 0))


def fit_map(picture: Image.Image, size: tuple[int, int], name: str, why: str) -> tuple[Image.Image, list[str]]:
    """A semantic map scaled without mixing its colours, and what is to be said of it."""
    if picture.size == size:
        return picture, []
    return ImageOps.fit(picture, size, method=Image.NEAREST), [_said(name, picture.size, size, why)]


def _scaled(picture, size):
    return picture if picture.size == size else ImageOps.fit(picture, size, method=Image.LANCZOS)


def _check_shapes(mask, area, image, picture):
    ratio = (area.width * picture.height) / (area.height * picture.width)
    if not 1 - SHAPES <= ratio <= 1 / (1 - SHAPES):
        raise ValueError(
            f"{mask} is {area.width}x{area.height} pixels and {image} {picture.width}x{picture.height}: "
            "a mask has the shape of its picture"
        )


def _said(name, have, size, why):
    ratio = have[0] * size[1] / (have[1] * size[0])
    part = "" if 1 - SHAPES <= ratio <= 1 / (1 - SHAPES) else "its middle, "
    other = "" if not part or why != MODEL else f" (--size {_same_shape(have, size)} would keep all of it)"
    return f"{name} is {have[0]}x{have[1]} pixels: {part}scaled to {size[0]}x{size[1]}, {why}{other}"


def _same_shape(have, size):
    """The size nearest to the picture's shape with about as many pixels as `size`, in 16ths of its sides."""
    grain = max(1, min(size) // 16)
    scale = (size[0] * size[1] / (have[0] * have[1])) ** 0.5
    return "x".join(str(max(grain, round(side * scale / grain) * grain)) for side in have)
