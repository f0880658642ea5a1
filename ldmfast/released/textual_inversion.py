"""Files of textual inversion: vectors that stand for a new word of a text tower. Nothing in a pickle is run.

diffusers      {token: [D] or [V, D]}, of several tokens too
the web UI     {"string_to_param": {"*": [V, D]}, "name": ..., ...}
kohya's        {"emb_params": [V, D]}
of SDXL        {"clip_l": [V, D1], "clip_g": [V, D2]}: a vector for each tower, of the web UI and kohya's
a tensor       [V, D]

A word of the first kind is the file's own; of the others the file's name without its ending, as the web UI has it.
Source: Gal et al. 2022 (arXiv 2208.01618).
"""

from __future__ import annotations

from pathlib import Path

import torch

from ldmfast.released.torch_files import TorchFile, is_tensor
from ldmfast.released.weights import read_weights

IN_A_FOLDER = ("learned_embeds.safetensors", "learned_embeds.bin")
_PICTURES = (".png", ".webp", ".jxl", ".avif", ".jpg", ".jpeg")
_OF_XL = ("clip_l", "clip_g")
_MOST_ROWS = 75  # what a text tower reads at once


def embedding_path(path: str | Path) -> Path:
    """The file that `path` is, or that a folder holds under diffusers' name. Raises FileNotFoundError."""
    path = Path(path)
    if path.is_dir():
        path = next((path / name for name in IN_A_FOLDER if (path / name).is_file()), path / IN_A_FOLDER[0])
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file of textual inversion")
    return path


def read_embedding(path: str | Path, token: str | None = None) -> dict[str, list[torch.Tensor]]:
    """{token: its vectors [V, D], float32, for one tower or for SDXL's two in their order}.

    token   in place of the file's own, where there is one
    Raises ValueError in one sentence for what is no such file.
    """
    path = embedding_path(path)
    if path.suffix.lower() in _PICTURES:
        raise ValueError(
            f"{path} is a picture; embeddings inside of pictures are not read, only .pt, .bin, .safetensors"
        )
    found = _by_token(path)
    if token is not None and len(found) > 1:
        raise ValueError(f"{path} has {len(found)} tokens ({', '.join(found)}); {token!r} cannot stand for all of them")
    if token is not None:
        found = {token: next(iter(found.values()))}
    return {name: [_rows(path, name, value) for value in values] for name, values in found.items()}


def _by_token(path: Path) -> dict[str, list[torch.Tensor]]:
    if bare := _bare_tensor(path):
        return {path.stem: bare}
    tensors, others = read_weights(path)
    if set(_OF_XL) & set(tensors):
        if absent := [name for name in _OF_XL if name not in tensors]:
            raise ValueError(f"{path} has no {absent[0]}; an embedding of SDXL has vectors for both text towers")
        return {path.stem: [tensors[name] for name in _OF_XL]}
    if set(tensors) == {"emb_params"}:
        return {path.stem: [tensors["emb_params"]]}
    if set(tensors) == {"*"} or "string_to_token" in others:
        if len(tensors) != 1:
            raise ValueError(f"{path} has {len(tensors)} embeddings in one; expected one")
        return {path.stem: list(tensors.values())}
    if not tensors:
        raise ValueError(f"{path} holds no vectors")
    return {name: [value] for name, value in tensors.items()}


def _bare_tensor(path: Path) -> list[torch.Tensor]:
    """The tensor that a pickle is, alone in a list; of any other file none."""
    with path.open("rb") as file:
        start = file.read(2)
    if start not in (b"PK", b"\x80\x02"):
        return []
    file = TorchFile(path)
    return [file.tensor(file.content)] if is_tensor(file.content) else []


def _rows(path: Path, name: str, value: torch.Tensor) -> torch.Tensor:
    rows = value[None] if value.ndim == 1 else value
    if rows.ndim != 2 or not rows.is_floating_point() or not 1 <= len(rows) <= _MOST_ROWS:
        what = f"its {name!r:.60} is {rows.dtype} {list(value.shape)}, expected up to {_MOST_ROWS} vectors [V, D]"
        raise ValueError(f"{path} is no file of textual inversion: {what}")
    if not torch.isfinite(rows).all():
        raise ValueError(f"{path}: the vectors of {name!r:.60} are not all finite")
    return rows.float()
