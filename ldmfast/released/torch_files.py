"""Files of `torch.save`, of today and from before 2020, and plain pickles of tensors, read without running anything.

zip      data.pkl, and data/KEY for each storage, uncompressed: mapped, not read
older    pickles one behind the other (a number, a version, the system, the content, the storages' keys), then the
         storages: their lengths as int64, and their bytes
pickle   each storage as the bytes of a file of the older kind
"""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ldmfast.files import first_line
from ldmfast.released.inert_pickle import Name, Object, Persistent, read_pickle

_MAGIC = 0x1950A86A20F9469CFC6C  # torch/serialization.py: MAGIC_NUMBER
_DTYPES = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
    "ComplexFloat": torch.complex64,
    "ComplexDouble": torch.complex128,
    "Untyped": torch.uint8,
}
_TENSOR = ("torch._utils _rebuild_tensor", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor_v3")
_PARAMETER = (
    "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_parameter_with_state",
    "torch.nn.parameter Parameter",
    "torch.nn.parameter Buffer",
)
_OF_A_TYPE = "torch._tensor _rebuild_from_type_v2"
_DEEPEST, _MODULES = 8, 100_000
_FAULTS = (ValueError, TypeError, AttributeError, LookupError, OverflowError, RuntimeError)


class TorchFile:
    """content   what was saved, its tensors as records that `tensor` makes real ones of

    Raises ValueError in one sentence for a truncated or damaged file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._made: dict[str, torch.UntypedStorage] = {}
        self._whole: torch.UntypedStorage | None = None
        self._zip = zipfile.is_zipfile(self.path)
        try:
            with self.path.open("rb") as file:
                start = file.read(2)
                if start == b"PK" and not self._zip:
                    raise ValueError("a zip file without its end")
                file.seek(0)
                self.content, self._places = _open_zip(file) if self._zip else _open_older(file)
        except (*_FAULTS, zipfile.BadZipFile, zlib.error, struct.error, EOFError) as error:
            raise self._damaged(error) from error
        except OSError as error:  # a place before the file's beginning is an "Invalid argument"
            if error.filename is not None:
                raise
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> ValueError:
        return ValueError(f"{self.path}: truncated or damaged ({first_line(error, 120)}); download it again")

    def tensor(self, record: Object, name: str = "a tensor") -> torch.Tensor:
        """The tensor of a record for which `is_tensor` holds. Raises ValueError naming one whose storage is short."""
        record = _plain_record(record)
        try:
            stored, offset, size, stride = record.arguments[:4]
            named = record.arguments[6] if record.kind.name.endswith("_v3") else None
            storage, dtype = self._storage(stored)
            dtype = dtype if named is None else getattr(torch, named.name.removeprefix("torch "))
            _check_extent(offset, size, stride, storage.nbytes() // dtype.itemsize)
            return torch.empty(0, dtype=dtype).set_(storage, offset, size, stride)
        except _FAULTS as error:
            raise ValueError(f"{self.path}: {name} is damaged ({first_line(error, 120)}); download it again") from error

    def _storage(self, stored: Any) -> tuple[torch.UntypedStorage, torch.dtype]:
        if isinstance(stored, Object) and stored.kind.name == "torch.storage _load_from_bytes":
            data = io.BytesIO(stored.arguments[0])
            inner, places = _open_older(data)
            key, dtype, length = _identity(inner)
            return _copied(data, *places[key], length * dtype.itemsize), dtype
        key, dtype, length = _identity(stored)
        if key not in self._made:
            place, there = self._places[key]
            with self.path.open("rb") as file:
                size = _size(file, place, there, length * dtype.itemsize)
                if self._zip and place % 16 == 0:
                    if self._whole is None:
                        self._whole = torch.UntypedStorage.from_file(str(self.path), False, size)
                    self._made[key] = self._whole[place : place + length * dtype.itemsize]
                else:
                    self._made[key] = _copied(file, place, there, length * dtype.itemsize)
        return self._made[key], dtype


def is_tensor(value: Any) -> bool:
    """Whether a value in a file's content is a tensor, or a parameter that is one."""
    value = _plain_record(value)
    return isinstance(value, Object) and isinstance(value.kind, Name) and value.kind.name in _TENSOR


def _plain_record(value: Any) -> Any:
    """The tensor inside of a parameter or of a tensor's subclass."""
    for _ in range(_DEEPEST):
        if not (isinstance(value, Object) and isinstance(value.kind, Name) and value.arguments):
            break
        if value.kind.name in _PARAMETER:
            value = value.arguments[0]
        elif value.kind.name == _OF_A_TYPE and len(value.arguments) > 2 and isinstance(value.arguments[2], tuple):
            value = Object(value.arguments[0], value.arguments[2])
        else:
            break
    return value


def tables(content: Any) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """(where it is, {name: value}) of each dict in a file's content that holds tensors, and of each saved module."""
    seen, waiting = set(), [((), content)]
    while waiting:
        path, value = waiting.pop(0)
        if id(value) in seen or len(path) > _DEEPEST:
            continue
        seen.add(id(value))
        if isinstance(value, Object) and isinstance(value.state, dict) and "_modules" in value.state:
            if found := _module_tensors(value):
                yield path, found
            continue
        table = value.items if isinstance(value, Object) else value
        if not isinstance(table, dict):
            continue
        if any(is_tensor(each) for each in table.values()):
            yield path, table
        inner = {name: each for name, each in table.items() if isinstance(name, str) and not is_tensor(each)}
        waiting += [((*path, name), each) for name, each in inner.items() if isinstance(each, dict | Object)]


def _module_tensors(module: Object) -> dict[str, Any]:
    """The parameters and buffers of a torch module that was pickled whole, by their names in its state_dict."""
    found, waiting = {}, [("", module)]
    for prefix, each in waiting:
        if not (isinstance(each, Object) and isinstance(each.state, dict)) or len(waiting) > _MODULES:
            continue
        parts = [each.state.get(kind) for kind in ("_parameters", "_buffers", "_modules")]
        parameters, buffers, modules = (part if isinstance(part, dict) else {} for part in parts)
        found |= {f"{prefix}{name}": value for name, value in (parameters | buffers).items() if is_tensor(value)}
        waiting += [(f"{prefix}{name}.", inner) for name, inner in modules.items()]
    return found


def _identity(stored: Any) -> tuple[str, torch.dtype, int]:
    """(key, dtype, elements) of a storage."""
    _, kind, key, _, length = stored.identity[:5]
    return key, _DTYPES[kind.name.split()[-1].removesuffix("Storage")], length


def _check_extent(offset: int, size: tuple, stride: tuple, there: int) -> None:
    numbers = (offset, *size, *stride)
    if len(size) != len(stride) or not all(type(n) is int and n >= 0 for n in numbers):
        raise ValueError(f"its size is {size}, its stride {stride}")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    elements = torch.Size(size).numel()
    if elements and max(last + 1, elements) > there:
        raise ValueError(f"it needs {max(last + 1, elements)} elements of a storage of {there}")


def _open_zip(file: BinaryIO) -> tuple[Any, dict[str, tuple[int, int]]]:
    """(the content, {key: (place in the file, bytes)})"""
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        homes = [name.removesuffix("data.pkl") for name in entries if name.endswith("data.pkl")]
        if not homes:
            raise ValueError("a zip file without torch's data.pkl")
        home = min(homes, key=len)
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries.values()):
            raise ValueError("its records are compressed, as torch never writes them")
        if home + "byteorder" in entries and archive.read(home + "byteorder") != b"little":
            raise ValueError("written on a machine that stores the highest byte first")
        content = read_pickle(io.BytesIO(archive.read(home + "data.pkl")))
    places = {}
    for name, entry in entries.items():
        if name.startswith(home + "data/"):
            file.seek(entry.header_offset + 26)  # of the local header: the lengths of the name and of what is added
            lengths = struct.unpack("<HH", file.read(4))
            places[name.removeprefix(home + "data/")] = (entry.header_offset + 30 + sum(lengths), entry.file_size)
    return content, places


def _open_older(file: BinaryIO) -> tuple[Any, dict[str, tuple[int, int]]]:
    """(the content, {key: (place in the file, bytes)}); of a plain pickle there are no places."""
    first = read_pickle(file)
    if first != _MAGIC:
        return first, {}
    _, system = read_pickle(file), read_pickle(file)
    if not system.get("little_endian", True):
        raise ValueError("written on a machine that stores the highest byte first")
    stored: list[Any] = []
    content, keys = read_pickle(file, stored), read_pickle(file)
    widths = {key: dtype.itemsize for key, dtype, _ in (_identity(Persistent(each)) for each in stored)}
    places, at = {}, file.tell()
    for key in keys:
        file.seek(at)
        length = struct.unpack("<q", file.read(8).ljust(8, b"\0"))[0] * widths[key]
        places[key] = (at + 8, length)
        at += 8 + length
    return content, places


def _copied(file: BinaryIO, place: int, there: int, wanted: int) -> torch.UntypedStorage:
    _size(file, place, there, wanted)
    file.seek(place)
    return torch.frombuffer(bytearray(file.read(wanted) or b"\0"), dtype=torch.uint8).untyped_storage()


def _size(file: BinaryIO, place: int, there: int, wanted: int) -> int:
    """Of the file in bytes. Raises ValueError where a storage goes beyond its record, or beyond the file."""
    size = file.seek(0, io.SEEK_END)
    if wanted > there or place + wanted > size:
        raise ValueError(f"its storage has {max(0, min(there, size - place))} bytes of {wanted}")
    return size
