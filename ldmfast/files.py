"""Files and folders that are whole or absent, whatever moment the process is killed at; nothing replaced is lost.

What is written goes to a temporary name beside its place, is flushed to the disk, and takes the place in one rename.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

_EXCHANGE = 2  # linux/fs.h: RENAME_EXCHANGE
_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)  # which a write raises without a name


class WriteError(OSError):
    """What the system said of a file or folder that was to be written, with its name."""

    def __str__(self) -> str:
        return self.strerror


def first_line(error: BaseException | str, longest: int = 160) -> str:
    """The first line of a message that may have many; of an empty one, the exception's type."""
    text = str(error).strip()
    return text.splitlines()[0].strip()[:longest] if text else type(error).__name__


@contextlib.contextmanager
def replacing(path) -> Iterator[Path]:
    """Context giving a temporary path of the same ending to write to; on leaving, the file takes `path`'s place.

    An error leaves `path` as it was and nothing beside it. Raises WriteError naming `path` where it cannot be written.
    """
    path = Path(path)
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        with _naming(path, partial):
            yield partial
            _flush(partial)
            os.replace(partial, path)
    finally:
        if partial.exists():
            partial.unlink()


def read_json(path) -> dict:
    """The object that a JSON file holds. Raises ValueError naming a file that is none, FileNotFoundError."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:  # of the bytes, or of the text
        raise ValueError(f"{path} is not JSON: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a JSON object of settings")
    return content


def write_text(path, text: str) -> None:
    """Write a text file, UTF-8."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def new_folder(folder) -> Iterator[Path]:
    """Context giving an empty folder to fill; on leaving it becomes `folder`.

    Nothing is waited for: a crash of the machine may cost what can be made again.
    Raises FileExistsError if `folder` is there and not empty.
    """
    folder = Path(folder).resolve()
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} exists and is not empty; choose another folder or remove it")
    with _partial(folder) as partial:
        yield partial
        os.replace(partial, folder)  # over an empty folder, too


@contextlib.contextmanager
def replacing_folder(folder, *, keep: bool = False) -> Iterator[Path]:
    """Context giving an empty folder to fill; on leaving it takes the place of `folder`, if that is there.

    At every moment `folder` holds all of the old or all of the new content (see `recover` for file systems that cannot
    exchange two names). A mount point or the working directory stays, and its entries change one by one.
    keep  what stands in the old folder under names that were not written stays in the new one
    """
    folder = Path(folder).resolve()
    recover(folder)
    with _partial(folder) as partial:
        yield partial
        if keep and folder.is_dir():
            _link_missing(folder, partial)
        _flush_tree(partial)
        _put(partial, folder)


def recover(folder) -> None:
    """Bring back a folder that a process was killed while replacing, where its name had to go for a moment."""
    folder = Path(folder).resolve()
    if not folder.name:  # the root
        return
    old = _old(folder)
    if old.is_dir() and not folder.exists():
        os.replace(old, folder)


def remove_leftovers(path) -> None:
    """Remove what killed processes left beside `path`, a file or folder that one process at a time writes."""
    path = Path(path)
    stem, suffix, name = (glob.escape(part) for part in (path.stem, path.suffix, path.name))
    for partial in (*path.parent.glob(f".{stem}.[0-9]*.partial{suffix}"), *path.parent.glob(f"{name}.[0-9]*.partial")):
        shutil.rmtree(partial) if partial.is_dir() else partial.unlink()


def _put(new: Path, place: Path) -> None:
    """`new`, a file or a folder, under the name `place`; what stood there is removed."""
    if not place.is_dir() or not new.is_dir():
        os.replace(new, place)
    elif _must_stay(place):
        _put_entries(new, place)
    elif not _exchange(new, place):  # else `new` holds the old content, and goes with the temporary name
        old = _old(place)
        shutil.rmtree(old, ignore_errors=True)
        os.replace(place, old)
        os.replace(new, place)
        shutil.rmtree(old)


def _must_stay(folder: Path) -> bool:
    """Whether the folder cannot go: a mount point, or the working directory, or above that."""
    return folder.is_mount() or folder.resolve() in (here := Path.cwd(), *here.parents)


def _put_entries(new: Path, folder: Path) -> None:
    """The entries of `new` in place of those of `folder`, one by one: each is whole at every moment."""
    names = {new.name, *(entry.name for entry in new.iterdir())}  # `new` itself may lie in a mount point
    for entry in list(new.iterdir()):
        _put(entry, folder / entry.name)
    for entry in list(folder.iterdir()):
        if entry.name not in names:
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def _exchange(a: Path, b: Path) -> bool:
    """Swap two names in one step; False where the system or the file system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None
    if rename is None:
        return False
    at_working_directory = ctypes.c_int(-100)  # AT_FDCWD
    if not rename(at_working_directory, os.fsencode(a), at_working_directory, os.fsencode(b), _EXCHANGE):
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise WriteError(number, f"{b} cannot be replaced: {os.strerror(number)}")


def _old(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.replaced")  # no name that a person gives to a copy


@contextlib.contextmanager
def _partial(folder: Path) -> Iterator[Path]:
    home = folder if folder.is_mount() else folder.parent  # names are exchanged within one file system
    partial = home / f"{folder.name}.{os.getpid()}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with _naming(folder, partial):
            partial.mkdir(parents=True)
            yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def _naming(path: Path, partial: Path) -> Iterator[None]:
    """Errors of the system while `partial` is written name `path`; others pass."""
    try:
        yield
    except OSError as error:
        about = str(error.filename).startswith(str(partial)) if error.filename else error.errno in _WRITING
        if not about:
            raise
        raise WriteError(error.errno, f"{path} cannot be written: {os.strerror(error.errno)}") from error
    except SafetensorError as error:  # what it makes of the system's errors
        if not str(error).startswith("Error while serializing"):
            raise
        raise WriteError(errno.EIO, f"{path} cannot be written: {first_line(error)}") from error


def _link_missing(source: Path, target: Path) -> None:
    """Everything in the folder `source` that `target` has no entry for, by hard links."""
    for entry in source.iterdir():
        if (target / entry.name).exists() or entry == target:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, target / entry.name, symlinks=True, copy_function=_link)
        else:
            _link(entry, target / entry.name)


def _link(source, target) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target, follow_symlinks=False)


def _flush_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            _flush(path)


def _flush(path: Path) -> None:
    """Wait until the file is on the disk, so that no crash leaves a renamed file without its content."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
