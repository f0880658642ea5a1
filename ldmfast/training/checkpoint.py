"""Checkpoints and exported folders that are complete or absent, whatever moment the process is killed at."""

import os
import pickle
import shutil
import zipfile
from pathlib import Path

import torch


def save(state, path):
    """Write `state` (tensors and plain values) to a temporary name, flush it to the disk, rename it over `path`."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def write_text(path, text):
    """Write a small text file, complete or not at all."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def load(path):
    """Read what `save` wrote. Raises ValueError for a file that is cut short or is no checkpoint."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile, KeyError) as error:
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise ValueError(f"{path} is damaged or no checkpoint ({reason}); remove it to begin again") from error


def replace_folder(folder, write):
    """Call `write(partial)` on an empty folder beside `folder`, then put it in `folder`'s place."""
    folder = Path(folder)
    partial, old = (folder.with_name(folder.name + end) for end in (".partial", ".old"))
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    write(partial)
    if folder.exists():
        os.replace(folder, old)
    os.replace(partial, folder)
    shutil.rmtree(old, ignore_errors=True)
