"""Pictures that are too many for the memory: decoded once into a file, and read from it as they are asked for.

The file is a cache: at its end stands what it was made from (a digest of names, sizes and times), and where that no
longer holds it is made anew. Its first line says where that is; from byte START on stand the pictures, uint8
[3, size, size] each.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ldmfast import files
from ldmfast.data.rows_on_disk import RowsOnDisk

LAYOUT = 1  # of the file; another number makes every cache anew
START = 4096


class Decoded(RowsOnDisk):
    """N pictures in a file, uint8 [3, size, size] each: what is indexed of it is read.

    index  which of the file's pictures these are, in order; by default all
    """

    row = "picture"

    def __init__(self, path: Path, count: int, size: int, index: torch.Tensor | None = None):
        super().__init__(open(path, "rb", buffering=0), START, (count, 3, size, size), torch.uint8, index)
        self.path, self.size = Path(path), size

    def part(self, keep: Sequence[int]) -> Decoded:
        """Those of them that `keep` lists."""
        return Decoded(self.path, 0, self.size, self._index[torch.as_tensor(keep, dtype=torch.int64)])


def kept(
    cache: Path, folder: Path, names: Sequence[str], size: int, decode: Callable[[Path], torch.Tensor]
) -> tuple[Decoded, list[int], list[str]]:
    """(the pictures, the indices of `names` that could be read, sentences on the others), from `cache` if it is theirs.

    decode  a file -> uint8 [3, size, size]; it raises ValueError or OSError, whose texts are the sentences
    """
    digest = _digest(folder, names, size)
    head = _head(cache)
    if head is None or head["digest"] != digest:
        head = _write(cache, folder, names, size, decode, digest)
    read = head["read"]
    return Decoded(cache, len(read), size), read, head["problems"]


def _digest(folder, names, size):
    found = hashlib.sha256(f"{LAYOUT} {size}\n".encode())
    for name in names:
        try:
            status = os.stat(Path(folder, name))
            state = f"{status.st_size} {status.st_mtime_ns}"
        except OSError as error:
            state = type(error).__name__
        found.update(f"{name}\0{state}\n".encode("utf-8", "surrogateescape"))
    return found.hexdigest()


def _head(cache):
    """What stands at the end of a cache, or None where there is none that can be read."""
    try:
        with open(cache, "rb") as file:
            tail = int(file.readline(START) or b"0")
            file.seek(tail)
            found = json.loads(file.read())
            return found if tail else None
    except (OSError, ValueError):
        return None


def _write(cache, folder, names, size, decode, digest):
    """Decode every file into `cache`; returns what `_head` does. What is said of broken files is kept, too."""
    read, problems = [], []
    Path(cache).parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(cache) as partial, open(partial, "wb") as file:
        file.seek(START)
        for i, name in enumerate(names):
            try:
                file.write(decode(Path(folder, name)).contiguous().numpy().tobytes())
                read.append(i)
            except (ValueError, OSError) as error:
                problems.append(str(error))
        tail = file.tell()
        head = {"digest": digest, "read": read, "problems": problems}
        file.write(json.dumps(head).encode())
        file.seek(0)
        file.write(f"{tail}\n".encode())
    return head
