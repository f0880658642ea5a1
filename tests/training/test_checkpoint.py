"""Saving checkpoints and latents where they cannot be saved."""

from __future__ import annotations

import errno
import os

import pytest
import torch
from safetensors import SafetensorError

from ldmfast import files
from ldmfast.training import checkpoint


class Full:
    """A file on a disk with room for some bytes."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        if len(data) > self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.room -= len(data)
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)


@pytest.mark.parametrize("room", [0, 200, 5000])
def test_a_full_disk_names_the_checkpoint_and_leaves_the_last_one(room, tmp_path, monkeypatch):
    path, write = tmp_path / "run.pt", torch.save
    checkpoint.save({"step": 1}, path)
    monkeypatch.setattr(torch, "save", lambda state, file: write(state, Full(file, room)))
    with pytest.raises(OSError) as error:
        checkpoint.save({"step": 2, "weights": torch.zeros(10**5)}, path)
    assert str(error.value) == f"{path} cannot be written: No space left on device"
    assert checkpoint.load(path) == {"step": 1} and [p.name for p in tmp_path.iterdir()] == ["run.pt"]


def test_another_error_of_torch_is_not_taken_for_a_full_disk(tmp_path, monkeypatch):
    def broken(state, file):
        raise RuntimeError("something else")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(RuntimeError, match="something else"):
        checkpoint.save({}, tmp_path / "run.pt")
    assert list(tmp_path.iterdir()) == []


def test_what_killed_runs_left_goes_with_the_next_save(tmp_path):
    for name in (".run.123.partial.pt", ".other.123.partial.pt", ".run.partial.pt"):
        (tmp_path / name).write_text("half")
    checkpoint.save({"step": 1}, tmp_path / "run.pt")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".other.123.partial.pt", ".run.partial.pt", "run.pt"]


def test_a_full_disk_under_safetensors_names_the_file(tmp_path):
    with pytest.raises(OSError, match=r"latents\.safetensors cannot be written: No space left on device$"):
        with files.replacing(tmp_path / "latents.safetensors"):
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    with pytest.raises(SafetensorError, match="header"), files.replacing(tmp_path / "latents.safetensors"):
        raise SafetensorError("invalid header")
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_that_is_cut_short_or_changed_is_named(tmp_path):
    path, rng = tmp_path / "run.pt", torch.Generator().manual_seed(0)
    checkpoint.save({"step": 1, "weights": torch.zeros(300)}, path)
    whole = path.read_bytes()
    for length in [*range(0, 64, 4), *range(64, len(whole), 41), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"run\.pt is damaged or no checkpoint \(.+\); remove it to begin again"):
            checkpoint.load(path)
    for _ in range(100):
        changed, (at, value) = bytearray(whole), torch.randint(2**20, (2,), generator=rng).tolist()
        changed[at % len(whole)] = value % 256
        path.write_bytes(changed)
        try:
            assert isinstance(checkpoint.load(path), dict)  # padding, or a weight: the format has no checksum of it
        except ValueError as error:
            assert str(error).startswith(f"{path} is ")


def test_another_file_is_no_checkpoint(tmp_path):
    torch.save(torch.zeros(3), tmp_path / "run.pt")
    with pytest.raises(ValueError, match=r"run\.pt is no checkpoint: it holds a Tensor"):
        checkpoint.load(tmp_path / "run.pt")
    for absent, kind in ((tmp_path / "none.pt", FileNotFoundError), (tmp_path, IsADirectoryError)):
        with pytest.raises(kind, match=str(absent)):
            checkpoint.load(absent)
