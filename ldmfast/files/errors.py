"""What the system, Pillow, torch and safetensors say of a failed write, in one sentence that names its place."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)  # which a write raises without a name
_PILLOW = "when writing image file"  # its encoders' error, without a number
_TORCH = ("PytorchStreamWriter failed", "unexpected pos", "open file failed", "iostream error")


class WriteError(OSError):
    """What the system said of a file or folder that was to be written, with its name."""

    def __init__(self, path, number: int | None, reason: str) -> None:
        super().__init__(number, f"{path} cannot be written: {reason}", str(path))

    def __str__(self) -> str:
        return self.strerror


def first_line(error: BaseException | str, longest: int = 160) -> str:
    """The first line of a message that may have many, the second too where the first announces it with a colon.

    Of an empty message, the exception's type.
    """
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])[:longest]


@contextlib.contextmanager
def naming(path: Path, partial: Path, *others: Path) -> Iterator[None]:
    """Errors of the system while `partial` is written, or `others` renamed, name `path`; other errors pass."""
    try:
        yield
    except WriteError as error:
        if not _lies_in(error.filename, partial):
            raise
        raise WriteError(path, error.errno, error.strerror.partition(" cannot be written: ")[2]) from error
    except OSError as error:
        about = any(_lies_in(error.filename, each) for each in (partial, *others))
        if not (about or error.filename is None and (error.errno in _WRITING or _PILLOW in str(error))):
            raise
        raise WriteError(path, error.errno, _reason(error)) from error
    except SafetensorError as error:  # what it makes of the system's errors
        if not str(error).startswith("Error while serializing"):
            raise
        found = re.search(r"\(os error (\d+)\)", str(error))
        number = int(found[1]) if found else errno.EIO
        raise WriteError(path, number, os.strerror(number) if found else first_line(error)) from error
    except RuntimeError as error:  # torch.save's: of a full disk it says "unexpected pos 704 vs 598"
        if isinstance(error.__context__, OSError):
            raise WriteError(path, error.__context__.errno, _reason(error.__context__)) from error
        if not any(word in str(error) for word in _TORCH):
            raise
        raise WriteError(path, errno.EIO, first_line(error)) from error


def _lies_in(name, folder: Path) -> bool:
    return name is not None and (Path(name) == folder or folder in Path(name).parents)


def _reason(error: OSError) -> str:
    return os.strerror(error.errno) if error.errno else first_line(error)
