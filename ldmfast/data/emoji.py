"""The demo collection: Noto colour emoji on coloured grounds, with captions.

64 objects, or 600 (emoji_words.py), on 8 grounds, each in a few placements. For every object
one ground is held out: those pictures are marked `"split": "heldout"` and no training stage reads them, so that they
measure composition, not memory.
The pictures come from the installed font's CBDT table (emoji artwork: Apache-2.0; font: OFL 1.1), or from a folder
of cut-outs written by `write_cutouts`.
"""

import io
import os
from pathlib import Path

import numpy as np
from PIL import Image

from ldmfast import files
from ldmfast.data.collection import write_rows
from ldmfast.data.emoji_words import captions, catalogue, file_stem
from ldmfast.pictures import read

FONT_PATHS = (
    "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf",  # Debian, Ubuntu
    "/usr/share/fonts/noto/NotoColorEmoji.ttf",  # Arch
    "/usr/share/fonts/noto-emoji/NotoColorEmoji.ttf",  # Alpine
    "/usr/share/fonts/google-noto-emoji/NotoColorEmoji.ttf",  # Fedora
    "/usr/share/fonts/google-noto-color-emoji-fonts/NotoColorEmoji.ttf",
)

COLOURS = {
    "red": (222, 76, 74),
    "orange": (250, 160, 74),
    "yellow": (255, 228, 112),
    "green": (112, 190, 116),
    "blue": (92, 152, 236),
    "purple": (166, 112, 206),
    "white": (247, 247, 247),
    "black": (38, 38, 42),
}


def held_out_colour(index):
    """The ground that object number `index` is never trained on."""
    return list(COLOURS)[index * 3 % len(COLOURS)]


def find_font(path=None):
    """The Noto colour emoji font. Raises FileNotFoundError, saying how to install it."""
    candidates = [path] if path else [os.environ.get("LDMFAST_EMOJI_FONT"), *FONT_PATHS]
    for candidate in filter(None, candidates):
        if Path(candidate).is_file():
            return Path(candidate)
    raise FileNotFoundError(
        f"no Noto colour emoji font at {path or 'the usual places'}: install it (Debian and Ubuntu: "
        "apt-get install fonts-noto-color-emoji), or give its path with --font or LDMFAST_EMOJI_FONT"
    )


def font_cutouts(path=None, objects="64"):
    """{name: RGBA picture, 136x128} for every object of the catalogue, read from the font's CBDT table."""
    try:
        from fontTools.ttLib import TTFont
    except ImportError as error:
        raise ImportError("reading the emoji font needs fonttools: pip install fonttools") from error
    path = find_font(path)
    with TTFont(path, lazy=True) as font:
        if "CBDT" not in font:
            raise ValueError(f"{path} has no CBDT table (glyphs that are pictures); use Noto Color Emoji's CBDT build")
        glyphs, strike = font.getBestCmap(), font["CBDT"].strikeData[0]
        wanted = catalogue(objects)
        missing = [names[0] for code, names in wanted.items() if code not in glyphs]
        if missing:
            raise ValueError(f"{path} lacks the emoji {', '.join(missing)}; a newer Noto Color Emoji has them")
        read = lambda code: Image.open(io.BytesIO(strike[glyphs[code]].imageData)).convert("RGBA")  # noqa: E731
        return {names[0]: read(code) for code, names in wanted.items()}


def folder_cutouts(folder):
    """{name: RGBA picture} from a folder of `red-apple.png`, ...: what `write_cutouts` wrote."""
    found = {n[0]: Path(folder, file_stem(n[0]) + ".png") for n in catalogue("all").values()}
    found = {name: path for name, path in found.items() if path.is_file()}
    if not found:
        raise FileNotFoundError(f"{folder} holds none of the cut-outs (red-apple.png, ...)")
    return {name: read(path, lambda picture, _: picture.convert("RGBA")) for name, path in found.items()}


def write_cutouts(cutouts, folder, size=64):
    """Save RGBA cut-outs, at most `size` pixels wide and high: the small set that ships with the tests."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, picture in cutouts.items():
        picture = picture.copy()
        picture.thumbnail((size, size), Image.LANCZOS)
        with files.replacing(Path(folder, file_stem(name) + ".png")) as partial:
            picture.save(partial, optimize=True)


def compose(cutout, colour, size=64, *, scale=0.88, shift=(0.0, 0.0)):
    """`cutout` on a flat ground: RGB, size x size; the longer side takes `scale`, `shift` is in parts of the size."""
    factor = scale * size / max(cutout.size)
    width, height = (max(1, round(side * factor)) for side in cutout.size)
    # premultiplied, else the hidden colour of transparent pixels bleeds into the rim
    small = cutout.convert("RGBa").resize((width, height), Image.LANCZOS).convert("RGBA")
    picture = Image.new("RGB", (size, size), COLOURS[colour])
    left, top = (round((size - side) / 2 + d * size) for side, d in zip((width, height), shift, strict=True))
    picture.paste(small, (left, top), small)
    return picture


def placements(count, seed=0):
    """`count` pairs (scale, shift), the first one centred; the same for every object."""
    rng = np.random.default_rng(seed)
    drawn = [(float(rng.uniform(0.78, 0.94)), tuple(map(float, rng.uniform(-0.05, 0.05, 2)))) for _ in range(count)]
    return [(0.88, (0.0, 0.0)), *drawn][:count]


def build(cutouts, folder, *, size=64, count=8, seed=0):
    """Write the collection: PNG files and metadata.jsonl (file_name, text, texts, object, colour, split).

    Returns the number of pictures. The folder appears complete or not at all.
    """
    rows = []
    with files.new_folder(folder) as partial:
        for index, names in enumerate(catalogue("all").values()):
            for colour in COLOURS if names[0] in cutouts else ():
                split = "heldout" if colour == held_out_colour(index) else "train"
                pictures = _placed(cutouts[names[0]], colour, size, count, seed)
                rows += [_write(picture, partial, names, colour, k, split) for k, picture in enumerate(pictures)]
        write_rows(rows, partial)
    return len(rows)


def _placed(cutout, colour, size, count, seed):
    return [compose(cutout, colour, size, scale=scale, shift=shift) for scale, shift in placements(count, seed)]


def _write(picture, folder, names, colour, number, split):
    """Write one picture; returns its row."""
    file_name, texts = f"{file_stem(names[0])}-{colour}-{number}.png", captions(names, colour)
    picture.save(folder / file_name)
    return dict(file_name=file_name, text=texts[0], texts=texts, object=names[0], colour=colour, split=split)
