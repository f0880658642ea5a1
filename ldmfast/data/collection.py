"""A picture collection: a folder of pictures, with captions in metadata.jsonl or in .txt files beside them.

metadata.jsonl has one object a line: `file_name`, `text` (the caption), optionally `texts` (more ways to say it),
`split` ("train" unless given), and any labels to be scored in `evaluate` (`object`, `colour`). That is also the
layout of Hugging Face's "imagefolder". Without it every picture below the folder is read.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


@dataclass(frozen=True)
class Pictures:
    """Pictures in memory: 3 * size * size bytes each."""

    pixels: torch.Tensor  # [N, 3, size, size] uint8
    rows: tuple  # N dicts: file_name, text, texts, split, labels

    def __len__(self):
        return len(self.rows)

    def batch(self, index):
        """index [B] -> float32 [B, 3, size, size] in [-1, 1]."""
        return self.pixels[index].float() / 127.5 - 1

    def where(self, **labels):
        """The pictures whose row has all these values."""
        return self._part([i for i, row in enumerate(self.rows) if all(row.get(k) == v for k, v in labels.items())])

    def sample(self, count, seed):
        """At most `count` of the pictures, chosen at random, in their order: enough for a mean."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return self._part(order[:count].sort().values.tolist())

    def _part(self, keep):
        return Pictures(self.pixels[keep], tuple(self.rows[i] for i in keep))


def read_picture(path, size):
    """A file as uint8 [3, size, size]: turned upright, transparency laid on white, centre-cropped to a square."""
    try:
        with Image.open(path) as picture:
            picture = ImageOps.exif_transpose(picture).convert("RGBA")
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{path} is not a picture that can be read: {error}") from error
    ground = Image.new("RGBA", picture.size, "white")
    picture = Image.alpha_composite(ground, picture).convert("RGB")
    if picture.size != (size, size):
        picture = ImageOps.fit(picture, (size, size), Image.LANCZOS)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def read_rows(folder):
    """The rows of a collection, sorted by file name. Raises ValueError naming the line that is wrong."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder of pictures")
    listing = folder / "metadata.jsonl"
    if not listing.is_file():
        return _rows_without_listing(folder)
    rows = []
    for number, line in enumerate(listing.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            row["file_name"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{listing}, line {number}: expected an object with file_name and text") from error
        row.setdefault("split", "train")
        row.setdefault("texts", [row["text"]] if row.get("text") else [])
        rows.append(row)
    return sorted(rows, key=lambda row: row["file_name"])


def write_rows(rows, folder):
    """Write metadata.jsonl."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    Path(folder, "metadata.jsonl").write_text("".join(lines), encoding="utf-8")


def _rows_without_listing(folder):
    rows = []
    for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES):
        beside = path.with_suffix(".txt")
        texts = [beside.read_text(encoding="utf-8").strip()] if beside.is_file() else []
        rows.append(dict(file_name=str(path.relative_to(folder)), text="".join(texts), texts=texts, split="train"))
    return rows


def load_pictures(folder, size, *, split=None, captions=False):
    """Read a collection. `split` keeps one split; `captions` demands a caption for every picture.

    Raises FileNotFoundError for a missing folder or file, ValueError for an empty or caption-less collection.
    """
    rows = [row for row in read_rows(folder) if split is None or row["split"] == split]
    if not rows:
        raise ValueError(f"{folder} holds no pictures" + (f" with split {split!r}" if split else ""))
    bare = next((row["file_name"] for row in rows if captions and not any(t.strip() for t in row["texts"])), None)
    if bare:
        raise ValueError(f"{folder}: {bare} has no caption; write it as text in metadata.jsonl or in a .txt beside it")
    pixels = torch.stack([read_picture(Path(folder, row["file_name"]), size) for row in rows])
    return Pictures(pixels, tuple(rows))
