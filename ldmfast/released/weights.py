"""Tensors from files: a safetensors file, a pickle read as data, or the weights of a diffusers part."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from ldmfast.files import first_line, read_json
from ldmfast.models.weight_files import not_weights, shapes
from ldmfast.released.inert_pickle import Name, Object
from ldmfast.released.torch_files import TorchFile, is_tensor, tables

STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
_ENDINGS = (".safetensors", ".bin")


def read_weights(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(tensors, what else the file holds, by name) of a safetensors file or a file of torch.save, whatever its ending.

    Tensors are mapped, not read, where the file allows it; nothing that a pickle names is run (inert_pickle.py).
    Raises ValueError in one sentence: a web page, an empty, truncated or damaged file, one without a table of tensors.
    """
    path = Path(path)
    with path.open("rb") as file:
        start = file.read(64)
    if problem := not_weights(start):
        raise ValueError(f"{path}: {problem}")
    if start[8:9] == b"{" or path.suffix == ".safetensors" and not start.startswith((b"PK", b"\x80")):
        shapes(path)
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
            return load_file(path), metadata
        except SafetensorError as error:
            raise ValueError(f"{path}: damaged ({first_line(error, 120)}); download it again") from error
    if not start.startswith((b"PK", b"\x80")):
        raise ValueError(f"{path}: neither a torch file nor a pickle nor safetensors (begins with {start[:8]!r})")
    return _read_torch(path)


def _read_torch(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    file = TorchFile(path)
    found = list(tables(file.content))
    if not found:
        raise ValueError(f"{path}: holds no table of tensors ({_what(file.content)})")
    at, table = max(found, key=_preference)
    tensors = {name: file.tensor(value, name) for name, value in table.items() if is_tensor(value) and _is_name(name)}
    others = {str(name): value for name, value in table.items() if not is_tensor(value)}
    content = file.content.items if isinstance(file.content, Object) else file.content
    beside = content if isinstance(content, dict) and content is not table else {}
    others |= {
        name: file.tensor(value, name) if is_tensor(value) else value
        for name, value in beside.items()
        if _is_name(name) and name != at[0]
    }
    return tensors, others


def _is_name(name: Any) -> bool:
    return isinstance(name, str)


def _preference(found: tuple[tuple[str, ...], dict]) -> tuple[bool, bool, int]:
    """A state_dict goes first, what is called averaged last; else the table with the most tensors."""
    at, table = found
    averaged = any("ema" in re.split(r"[^a-z]+", name.lower()) for name in at)
    return at[:1] == ("state_dict",), not averaged, sum(map(is_tensor, table.values()))


def _what(content: Any) -> str:
    if isinstance(content, dict):
        return f"a dict with {', '.join(map(repr, list(content)[:3]))}" if content else "an empty dict"
    named = isinstance(content, Object) and isinstance(content.kind, Name)
    return f"a {content.kind.name.replace(' ', '.')}" if named else f"a {type(content).__name__}"


def part_weights(folder: Path) -> tuple[dict[str, torch.Tensor], str | None]:
    """(tensors, stem of the file's name) of a diffusers or transformers part, whole or in shards; None: no weights.

    Raises ValueError as `read_weights`, FileNotFoundError for a shard that is missing.
    """
    for stem in STEMS:
        for suffix in (".safetensors", ".bin"):
            if (folder / (stem + suffix)).is_file():
                return read_weights(folder / (stem + suffix))[0], stem
            index = folder / f"{stem}{suffix}.index.json"
            if index.is_file():
                files = sorted(set(read_json(index)["weight_map"].values()))
                return {k: v for file in files for k, v in read_weights(folder / file)[0].items()}, stem
    variants = sorted(folder.glob("*.safetensors"))  # such as diffusion_pytorch_model.fp16.safetensors
    if len(variants) > 1:
        raise ValueError(f"{folder} has {', '.join(p.name for p in variants)}: name one by keeping only that")
    return (read_weights(variants[0])[0], variants[0].name.split(".")[0]) if variants else ({}, None)
