"""Files and folders that are whole or absent, whatever moment the process is killed at; nothing replaced is lost.

What is written goes to a temporary name beside its place, is flushed to the disk, and takes the place in one rename.
While that goes on its process holds a lock on it; what a killed one left has none, and goes with the next save there.
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

from ldmfast.files.errors import WriteError, first_line, naming
from ldmfast.files.locks import held, is_held

__all__ = [
    "WriteError",
    "first_line",
    "new_folder",
    "read_json",
    "recover",
    "remove_leftovers",
    "replacing",
    "replacing_folder",
    "write_text",
]

_EXCHANGE = 2  # linux/fs.h: RENAME_EXCHANGE


@contextlib.contextmanager
def replacing(path) -> Iterator[Path]:
    """Context giving a path of the same name in a temporary folder; on leaving, the file takes `path`'s place.

    An error leaves `path` as it was and nothing beside it. Raises WriteError naming `path` where it cannot be written.
    """
    path = Path(path)
    with _temporary(path, path.parent / f".{path.stem}.{os.getpid()}.partial{path.suffix}") as folder:
        partial = folder / path.name  # what a writer puts beside it for a while (safetensors does) goes with the folder
        yield partial
        _flush(partial)
        os.replace(partial, path)


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
    with _temporary(folder, _home(folder) / f"{folder.name}.{os.getpid()}.partial", parents=True) as partial:
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
    with _temporary(folder, _home(folder) / f"{folder.name}.{os.getpid()}.partial", parents=True) as partial:
        yield partial
        with naming(folder, partial, folder, _old(folder)):
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


def remove_leftovers(path, *, alone: bool = False) -> None:
    """Remove what killed processes left beside `path`, a file or folder: temporary names that no process holds.

    alone  one process at a time writes `path`: also where the file system cannot say who holds what
    """
    path = Path(path)
    stem, suffix, name = (glob.escape(part) for part in (path.stem, path.suffix, path.name))
    home = _home(path)
    for partial in (*home.glob(f".{stem}.[0-9]*.partial{suffix}"), *home.glob(f"{name}.[0-9]*.partial")):
        own = f".{os.getpid()}.partial" in partial.name  # of a process that had this one's number
        if is_held(partial, unless_known=not (alone or own)):
            continue
        shutil.rmtree(partial, ignore_errors=True) if partial.is_dir() else partial.unlink(missing_ok=True)


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
        try:
            os.replace(new, place)
        except OSError:
            os.replace(old, place)
            raise
        shutil.rmtree(old, ignore_errors=True)


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
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM):  # the last of a sandbox
        return False
    raise OSError(number, os.strerror(number), str(b))


def _old(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.replaced")  # no name that a person gives to a copy


def _home(path: Path) -> Path:
    """Where temporary names go: names are exchanged within one file system."""
    return path if path.is_mount() else path.parent


@contextlib.contextmanager
def _temporary(path: Path, folder: Path, *, parents: bool = False) -> Iterator[Path]:
    """Context giving the empty `folder`, gone afterwards; errors of writing there name `path`."""
    remove_leftovers(path)
    with naming(path, folder):
        try:
            folder.mkdir(parents=parents)
        except FileExistsError:  # its lock is held: another thread here
            raise WriteError(path, errno.EBUSY, "it is being written already") from None
        try:
            with held(folder):
                yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


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
