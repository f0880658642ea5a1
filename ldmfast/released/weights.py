"""Tensors from files: a safetensors file, a pickle without code, or the weights of a diffusers part."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from ldmfast.files import first_line, read_json
from ldmfast.models.weight_files import not_weights, shapes

STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")


def read_weights(path: str | Path) -> tuple[dict[str, torch.Tensor], dict]:
    """(tensors, what else the file holds) of a .safetensors file or a .ckpt, .pt, .pth, .bin that needs no code.

    Tensors are mapped, not read. Raises ValueError in one sentence: a web page, a truncated file, a pickle with code.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        shapes(path)
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        return load_file(path), metadata
    return _read_pickle(path)


def _read_pickle(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    with path.open("rb") as file:
        start = file.read(64)
    if problem := not_weights(start):
        raise ValueError(f"{path}: {problem}")
    if not start.startswith((b"PK", b"\x80")):
        raise ValueError(f"{path}: neither a torch file nor a pickle (begins with {start[:8]!r})")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path) or None)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path}: {_code_in_pickle(error)}") from error
    except (RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{path}: truncated or damaged ({first_line(error, 120)}); download it again") from error
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not any(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{path}: holds no table of tensors (a {type(content).__name__})")
    others = {name: value for name, value in state.items() if not isinstance(value, torch.Tensor)}
    others |= {name: value for name, value in content.items() if name != "state_dict" and state is not content}
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}, others


def _code_in_pickle(error: Exception) -> str:
    """What torch says, as one sentence: a pickle that names classes would run their code."""
    for word in str(error).split():
        name = word.strip("`'\".,()")
        if name.count(".") >= 1 and name.replace(".", "").replace("_", "").isalnum() and not name.startswith("torch."):
            what = f"needs {name}, which is code, not weights"
            break
    else:
        what = "holds more than tensors and plain values"
    return (
        f"the pickle {what}, and is not run; use the .safetensors file of this model, or, if you trust its origin, "
        "save its weights alone: torch.save({'state_dict': torch.load(IN, weights_only=False)['state_dict']}, OUT)"
    )


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
