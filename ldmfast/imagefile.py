"""Picture files that are whole or absent, and grids of pictures."""

import contextlib
import math
import os
from pathlib import Path

from PIL import Image

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


@contextlib.contextmanager
def writing(path):
    """Context giving `write(picture)`. The path is tried before any work is done, under a temporary name.

    Raises ValueError for an unknown suffix, OSError for a path that cannot be written.
    """
    path = Path(path)
    kind = FORMATS.get(path.suffix.lower())
    if kind is None:
        raise ValueError(f"{path}: a picture's name ends in {', '.join(FORMATS)}")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give a file name")
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        file = open(partial, "wb")
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror}") from error
    try:
        with file:
            yield lambda picture: picture.save(file, format=kind)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def grid(pictures, columns=None, scale=1, gap=4):
    """N pictures of one size in rows; `scale` enlarges each. One picture comes back without a margin."""
    columns = min(len(pictures), columns or math.ceil(math.sqrt(len(pictures))))
    width, height = (side * scale for side in pictures[0].size)
    rows = math.ceil(len(pictures) / columns)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for i, picture in enumerate(pictures):
        place = (i % columns * (width + gap), i // columns * (height + gap))
        sheet.paste(picture.resize((width, height), Image.BICUBIC), place)
    return sheet
