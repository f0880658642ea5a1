"""A collection of crops from real photographs, split by photograph: nothing of a held-out one is ever trained on.

The photographs come from installed packages, each with its author and licence noted in the rows and its file's name as
caption, or from a folder, with captions and classes as data/listing.py finds them there: each crop has its
photograph's. Splits that the folder has stay; else they are drawn.
    Debian lomiri-wallpapers-16.04   CC-BY-4.0, CC-BY-SA-4.0, CC0-1.0
    Debian mate-backgrounds          GPL-2+ (the photographs in nature/)
    PyPI   scikit-learn              CC-BY (its two sample images)
"""

from __future__ import annotations

import importlib.util
import math
import random
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from ldmfast import files
from ldmfast.data.collection import read_rows, write_rows
from ldmfast.data.listing import SUFFIXES
from ldmfast.pictures import read

SHARE = Path("/usr/share")
DRAWN = {"analogpattern_by_Peter_Nerlich.jpg", "umang_by_Abhishek_Mudgal.jpg"}  # wallpapers that are no photographs
SOURCES = {
    "lomiri-wallpapers-16.04": "apt install lomiri-wallpapers-16.04",
    "mate-backgrounds": "apt install mate-backgrounds",
    "scikit-learn": "pip install --no-deps scikit-learn",
}


@dataclass(frozen=True)
class Photo:
    """A file, who made it under which licence, and what is said of it: text, texts, and labels."""

    path: Path
    source: str
    author: str = ""
    licence: str = ""
    said: dict = field(default_factory=dict)
    split: str = "train"


def installed(share: Path = SHARE) -> tuple[list[Photo], list[str]]:
    """(photographs found, sources that are missing), in a fixed order."""
    found = {
        "lomiri-wallpapers-16.04": _debian(share, "lomiri-wallpapers-16.04", "backgrounds/*_by_*.jpg", "16.04"),
        "mate-backgrounds": _debian(share, "mate-backgrounds", "backgrounds/mate/nature/*.jpg", "nature"),
        "scikit-learn": _scikit_learn(),
    }
    missing = [name for name, photos in found.items() if not photos]
    return [photo for photos in found.values() for photo in photos], missing


def _debian(share: Path, package: str, pattern: str, folder: str) -> list[Photo]:
    """A package's pictures that its copyright file names, with author and licence from there."""
    listing = share / "doc" / package / "copyright"
    if not listing.is_file():
        return []
    known = _copyright(listing.read_text(encoding="utf-8"))
    photos = []
    for path in sorted(share.glob(pattern)):
        entry = known.get(f"{folder}/{path.name}")
        if entry and path.name not in DRAWN:
            photos.append(Photo(path, package, *entry, _named(path)))
    return photos


def _copyright(text: str) -> dict[str, tuple[str, str]]:
    """{file: (author, licence)} from Debian's machine-readable copyright format."""
    known = {}
    for stanza in re.split(r"\n\s*\n", text):
        fields = dict(re.findall(r"^(Files|Copyright|License):((?:.*\n?)(?:[ \t]+.*\n?)*)", stanza, flags=re.MULTILINE))
        if {"Files", "Copyright", "License"} <= fields.keys():
            author = "; ".join(line.strip() for line in fields["Copyright"].splitlines() if line.strip())
            entry = author, fields["License"].split("\n")[0].strip()
            known |= dict.fromkeys(fields["Files"].split(), entry)
    return known


def _scikit_learn() -> list[Photo]:
    """Its two sample images; the package is found, not imported."""
    spec = importlib.util.find_spec("sklearn")
    homes = [Path(home, "datasets", "images") for home in (spec.submodule_search_locations or ())] if spec else []
    found = [path for home in homes for path in sorted(home.glob("*.jpg"))]
    author = "see datasets/images/README.txt there"
    return [Photo(path, "scikit-learn", author, "CC-BY", _named(path)) for path in found]


def _named(path: Path) -> dict:
    """A file's name as its caption: GreenMeadow_by_A.jpg is "green meadow"."""
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", path.stem.partition("_by_")[0])
    text = " ".join(re.split(r"[\s_-]+", name)).lower()
    return {"text": text, "texts": [text]}


def in_folder(folder: str | Path) -> list[Photo]:
    """The photographs of a collection (data/listing.py), with what their rows say in words.

    Raises FileNotFoundError if there is none, ValueError naming each line of metadata and caption that is wrong.
    """
    rows = read_rows(folder)
    if not rows:
        raise FileNotFoundError(f"{folder} holds no pictures ({', '.join(sorted(SUFFIXES))})")
    own = ("file_name", "split")
    words = [{k: v for k, v in row.items() if k == "texts" or isinstance(v, str) and k not in own} for row in rows]
    found = zip(rows, words, strict=True)
    return [Photo(Path(folder, row["file_name"]), str(folder), said=said, split=row["split"]) for row, said in found]


def split_of(photos: list[Photo], share: float, seed: int) -> list[str]:
    """ "train" or "heldout" for each photograph: `share` of them, at least one and not all, drawn by `seed`.

    Where a photograph has a split other than "train", the splits that they have stay; a share of 0 holds out none.
    Raises ValueError for a split of fewer than two photographs or a share outside 0 to 1.
    """
    if not 0 <= share < 1:
        raise ValueError(f"heldout={share} must be at least 0 and below 1")
    if share == 0 or any(photo.split != "train" for photo in photos):
        return [photo.split for photo in photos]
    if len(photos) < 2:
        raise ValueError("one photograph alone: a split by photograph needs two; --heldout 0 makes none")
    count = min(max(1, round(share * len(photos))), len(photos) - 1)
    held = set(random.Random(seed).sample(range(len(photos)), count))
    return ["heldout" if i in held else "train" for i in range(len(photos))]


def crops(
    photo: Photo, size: int, count: int, rng: random.Random
) -> Iterator[tuple[tuple[int, int, int, int], Image.Image]]:
    """`count` square crops of `size` pixels at random places and scales.

    A crop's side in the photograph is spread evenly in its logarithm, from 2 * size to the photograph's shorter side:
    the smallest are still shrunk by half, so that no JPEG block is learned.
    """
    picture = read(photo.path)
    shorter = min(picture.size)
    least = min(2 * size, shorter)
    for _ in range(count):
        side = round(math.exp(rng.uniform(math.log(least), math.log(shorter))))
        left, top = (rng.randint(0, length - side) for length in picture.size)
        box = (left, top, left + side, top + side)
        yield box, picture.resize((size, size), Image.LANCZOS, box=box, reducing_gap=3.0)


def build(photos: list[Photo], folder, *, size: int = 64, count: int = 120, heldout: float = 0.2, seed: int = 0) -> int:
    """Write the collection to `folder` (see data/collection.py). Returns the number of crops.

    count    crops of each photograph
    heldout  share of the photographs (not of the crops) kept from training; 0: none
    """
    if size < 1 or count < 1:
        raise ValueError(f"size={size} and count={count} must be at least 1")
    splits = split_of(photos, heldout, seed)
    rows = []
    with files.new_folder(folder) as partial:
        for number, (photo, split) in enumerate(zip(photos, splits, strict=True)):
            credit = dict(photo=photo.path.name, source=photo.source, author=photo.author, licence=photo.licence)
            for i, (box, picture) in enumerate(crops(photo, size, count, random.Random(f"{seed}/{photo.path.name}"))):
                name = f"{number:03d}-{i:04d}.png"
                picture.save(partial / name)
                said = {"text": "", "texts": [], **photo.said}
                rows.append({**said, "file_name": name, "split": split, **credit, "box": box})
        write_rows(rows, partial)
    return len(rows)


def collect(folder: str | None = None) -> list[Photo]:
    """The photographs of `folder`, or the installed ones; a source that is missing is named on stderr.

    Raises FileNotFoundError with what to install if there is none.
    """
    if folder:
        return in_folder(folder)
    photos, missing = installed()
    ways = "; ".join(SOURCES[name] for name in missing)
    if not photos:
        raise FileNotFoundError(f"no photographs are installed: {ways}; or give --photos FOLDER")
    if missing:
        print(f"ldmfast: without {', '.join(missing)} ({ways})", file=sys.stderr)
    return photos
