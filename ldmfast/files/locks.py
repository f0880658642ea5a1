"""Locks on temporary files and folders: who writes them holds one, and it goes with the process."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: nothing tells then whether a temporary name is in use
    fcntl = None


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold a lock on a folder, where the system and the file system have such; it goes with the process."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _lock(descriptor)
        yield
    finally:
        os.close(descriptor)


def is_held(partial: Path, unless_known: bool) -> bool:
    """Whether another process holds `partial`; `unless_known` where that cannot be found out."""
    if fcntl is None:
        return unless_known
    try:
        descriptor = os.open(partial, os.O_RDONLY if partial.is_dir() else os.O_RDWR)
    except FileNotFoundError:  # its process has just finished
        return True
    except OSError:  # another user's
        return unless_known
    try:
        locked = _lock(descriptor)
        return unless_known if locked is None else not locked
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool | None:
    """Whether the lock is ours now; None if the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True
