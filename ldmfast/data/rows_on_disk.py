"""Tables that are too large for the memory: rows of one shape in a file, read as they are indexed."""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from ldmfast import files

IN_MEMORY = 512 * 2**20  # bytes of a table, up to which it stays in memory
NAMES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "BOOL": torch.bool}


class RowsOnDisk:
    """N rows in an open file, one after another from byte `start` on. It stays open until nothing refers to it.

    shape  (N, ...) of what the file holds
    index  which of its rows these are, in order; by default all
    """

    row = "row"  # what one is called where it is missing

    def __init__(
        self, file: BinaryIO, start: int, shape: Sequence[int], dtype: torch.dtype, index: torch.Tensor | None = None
    ):
        self._file, self._start, self._row, self.dtype = file, start, tuple(shape[1:]), dtype
        self._index = torch.arange(shape[0]) if index is None else index
        self._bytes = _nbytes(self._row, dtype)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self._index), *self._row))

    def __len__(self) -> int:
        return len(self._index)

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point

    def __getitem__(self, index: int | slice | Sequence[int] | torch.Tensor) -> torch.Tensor:
        """[B, ...] of what `index` (slice, list or tensor) selects; [...] for a number. Raises ValueError if cut."""
        chosen = self._index[index]
        found = torch.empty(chosen.numel(), *self._row, dtype=self.dtype)
        places = found.flatten().view(torch.uint8).view(chosen.numel(), self._bytes).numpy()
        for place, number in zip(places, chosen.reshape(-1).tolist(), strict=True):
            if os.preadv(self._file.fileno(), [place], self._start + number * self._bytes) != self._bytes:
                raise ValueError(
                    f"{self._file.name} ends before its {self.row} {number}: it was cut; remove it, and it is made anew"
                )
        return found.reshape((*chosen.shape, *self._row))

    def write(self, first: int, rows: torch.Tensor) -> None:
        """Put `rows` [B, ...] from row `first` of the file on."""
        data = memoryview(rows.detach().to("cpu", self.dtype).contiguous().flatten().view(torch.uint8).numpy())
        place = self._start + first * self._bytes
        while data:
            done = os.pwrite(self._file.fileno(), data, place)
            data, place = data[done:], place + done


Tables = dict[str, tuple[Sequence[int], torch.dtype]]  # {name: (shape (N, ...), dtype)}


def large(tables: Tables) -> bool:
    """Whether they take more than IN_MEMORY bytes together."""
    return sum(_nbytes(*table) for table in tables.values()) > IN_MEMORY


def scratch(folder: str | Path, tables: Tables) -> dict[str, RowsOnDisk]:
    """Tables to write in a file of `folder` that has no name: it is gone with the process, and nobody else's."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    return _laid_out(tempfile.TemporaryFile(dir=folder, buffering=0), 0, tables)


def keep(path: str | Path, tables: Tables, metadata: dict[str, str], fill: Callable[[dict], None]) -> None:
    """Write a safetensors file of `tables`; `fill` is given {name: RowsOnDisk} to write. It is there whole, or not."""
    entries, end = {"__metadata__": metadata}, 0
    names = {dtype: name for name, dtype in NAMES.items()}
    for name, (shape, dtype) in tables.items():
        begin, end = end, end + _nbytes(shape, dtype)
        entries[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    head = json.dumps(entries).encode()
    head += b" " * (-len(head) % 8)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(path) as partial, open(partial, "w+b", buffering=0) as file:
        file.write(struct.pack("<Q", len(head)) + head)
        file.truncate(8 + len(head) + end)
        fill(_laid_out(file, 8 + len(head), tables))


def kept_or_made(
    path: str | Path,
    what: str,
    made_from: dict[str, str],
    tables: Callable[[], Tables],
    fill: Callable[[dict], None],
    spoken: dict[str, str] | None = None,
) -> dict[str, RowsOnDisk | torch.Tensor]:
    """The tables of `path`, which is written by `keep` if it is not there; those that are large stay in the file.

    what       what it holds, for the sentence about a file that holds something else
    made_from  {name: digest} of what it was made from
    spoken     {name in the file: how a sentence calls it}, where that differs
    Raises ValueError for a file that holds none, or was made from something else.
    """
    if not Path(path).exists():
        keep(path, tables(), made_from, fill)
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:  # the latter of a folder
        raise ValueError(f"{path} holds no {what} ({error}); remove it, and it is made anew") from error
    other = [(spoken or {}).get(name, name) for name, value in made_from.items() if metadata.get(name) != value]
    if other:
        raise ValueError(f"{path} was made from other {' and other '.join(other)}; remove it, or name another")
    found = kept(path)
    stays = large({name: (table.shape, table.dtype) for name, table in found.items()})
    return found if stays else {name: table[:] for name, table in found.items()}


def digest(tensors: Iterable[torch.Tensor]) -> str:
    """SHA-256 of tensors: their values, shapes and dtypes."""
    found = hashlib.sha256()
    for tensor in tensors:
        tensor = tensor.detach().cpu().contiguous()
        found.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def kept(path: str | Path) -> dict[str, RowsOnDisk]:
    """The tables of a safetensors file, which is known to be one."""
    file = open(path, "rb", buffering=0)
    (length,) = struct.unpack("<Q", file.read(8))
    entries = json.loads(file.read(length))
    entries.pop("__metadata__", None)
    start = 8 + length
    return {
        name: RowsOnDisk(file, start + each["data_offsets"][0], each["shape"], NAMES[each["dtype"]])
        for name, each in entries.items()
    }


def _laid_out(file, start, tables):
    found = {}
    for name, (shape, dtype) in tables.items():
        found[name] = RowsOnDisk(file, start, shape, dtype)
        start += _nbytes(shape, dtype)
    return found


def _nbytes(shape, dtype):
    return math.prod(shape) * dtype.itemsize
