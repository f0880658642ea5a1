"""A picture collection: a folder of pictures, with captions as data/listing.py finds them."""

import json
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from ldmfast.data import decoded, listing, rows_on_disk
from ldmfast.data.decoded import Decoded
from ldmfast.pictures import read

CACHE = "pictures.cache"  # in a training's folder, where its pictures are too many for the memory
PIXELS = 64 * 128 * 128  # that go through an autoencoder at a time
NAMED = 20  # pictures without a caption that are named, where more are


@dataclass(frozen=True)
class Pictures:
    """Pictures of one size, in memory (3 * size * size bytes each) or in a file that they are read from."""

    pixels: torch.Tensor | Decoded  # [N, 3, size, size] uint8
    rows: tuple  # N dicts: file_name, text, texts, split, labels

    def __len__(self):
        return len(self.rows)

    def batch(self, index):
        """index [B] -> float32 [B, 3, size, size] in [-1, 1]."""
        return self.pixels[index].float() / 127.5 - 1

    def parts(self, most=64):
        """Slices that cover the pictures, `most` of them at a time; fewer where they are large, for the memory."""
        together = max(1, min(most, PIXELS // self.pixels.shape[2:].numel()))
        return [slice(start, start + together) for start in range(0, len(self), together)]

    def where(self, **labels):
        """The pictures whose row has all these values; split="heldout" is every split but "train"."""
        return self._part([i for i, row in enumerate(self.rows) if all(_has(row, k, v) for k, v in labels.items())])

    def sample(self, count, seed):
        """At most `count` of the pictures, chosen at random, in their order: enough for a mean."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return self._part(order[:count].sort().values.tolist())

    def _part(self, keep):
        pixels = self.pixels.part(keep) if isinstance(self.pixels, Decoded) else self.pixels[keep]
        return Pictures(pixels, tuple(self.rows[i] for i in keep))


def _has(row, key, value):
    held_out = key == "split" and value == "heldout" and row[key] != "train"
    return held_out or row.get(key) == value


def read_picture(path, size):
    """A file as uint8 [3, size, size], made RGB by pictures.rgb and centre-cropped to a square.

    Raises FileNotFoundError, and ValueError naming a file that cannot be read.
    """
    picture = read(path)
    if picture.size != (size, size):
        picture = ImageOps.fit(picture, (size, size), Image.LANCZOS)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def read_rows(folder):
    """The rows of a collection, sorted by file name. Raises ValueError naming each line and file that is wrong."""
    rows, problems = _find(folder)
    if problems:
        raise ValueError(_list(folder, problems))
    return rows


def write_rows(rows, folder):
    """Write metadata.jsonl."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    Path(folder, "metadata.jsonl").write_text("".join(lines), encoding="utf-8")


def load_pictures(folder, size, *, split=None, captions=False, skip_broken=False, cache=None):
    """Read a collection. `split` keeps one split; `captions` demands a caption for every picture.

    cache        a file: where the pictures take more than rows_on_disk.IN_MEMORY bytes they are decoded into it, once,
                 and read from there a batch at a time; without it all of them are in memory
    skip_broken  leave out what cannot be read, with a warning that names each file and line, in place of stopping
    Raises FileNotFoundError for a missing folder, ValueError for an empty or caption-less collection, and one that
    names every broken file and line.
    """
    found, problems = _find(folder)
    rows = [row for row in found if split is None or _has(row, "split", split)]
    if not rows and not problems:
        raise ValueError(f"{folder} holds no pictures" + (f" with split {split!r}" if split else ""))
    if captions:
        _check_captions(folder, rows)
    pixels, kept, unread = _decode(folder, rows, size, cache)
    problems += unread
    if problems and not (skip_broken and kept):
        raise ValueError(_list(folder, problems))
    if problems:
        warnings.warn(f"left out of the training: {_list(folder, problems)}", stacklevel=2)
    return Pictures(pixels, tuple(kept))


def _decode(folder, rows, size, cache):
    """(pixels, the rows whose pictures could be read, sentences on the others)."""
    if cache and len(rows) * 3 * size * size > rows_on_disk.IN_MEMORY:
        names = [row["file_name"] for row in rows]
        pixels, read, problems = decoded.kept(cache, folder, names, size, lambda path: read_picture(path, size))
        return pixels, [rows[i] for i in read], problems
    pixels, kept, problems = [], [], []
    for row in rows:
        try:
            pixels.append(read_picture(Path(folder, row["file_name"]), size))
            kept.append(row)
        except (ValueError, OSError) as error:
            problems.append(str(error))
    return torch.stack(pixels) if pixels else torch.empty(0, 3, size, size, dtype=torch.uint8), kept, problems


def _find(folder):
    rows, problems, unread = listing.find(folder)
    if unread:
        what = f"{len(unread)} of a kind that is not read, left out"
        warnings.warn(f"{folder}: {what}: {', '.join(unread)}; save them as PNG or JPEG", stacklevel=3)
    return rows, problems


def _list(folder, problems):
    if len(problems) == 1:
        return problems[0]
    return f"{folder}: {len(problems)} files or lines cannot be read:\n  " + "\n  ".join(problems)


def _check_captions(folder, rows):
    bare = [row["file_name"] for row in rows if not any(text.strip() for text in row["texts"])]
    if bare:
        names = ", ".join(bare[:NAMED]) + (f" and {len(bare) - NAMED} more" if len(bare) > NAMED else "")
        what = "has no caption; write it" if len(bare) == 1 else "have no caption; write each"
        raise ValueError(f"{folder}: {names} {what} as text in metadata.jsonl or in a .txt beside it")
