"""Tensors from files: a safetensors file, a pickle read as data, or the weights of a diffusers part."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ldmfast.files import first_line, read_json
from ldmfast.models.weight_files import not_weights, shapes
from ldmfast.released.inert_pickle import Name, Object
from ldmfast.released.torch_files import TorchFile, is_tensor, tables

STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
_ENDINGS = (".safetensors", ".bin")
_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


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
                return _mapped(path, file), file.metadata() or {}
        except SafetensorError as error:
            raise ValueError(f"{path}: damaged ({first_line(error, 120)}); download it again") from error
    if not start.startswith((b"PK", b"\x80")):
        raise ValueError(f"{path}: neither a torch file nor a pickle nor safetensors (begins with {start[:8]!r})")
    return _read_torch(path)


def _mapped(path: Path, file: safe_open) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, which `file` has checked: views of one mapping, a fraction of the time."""
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        table = json.loads(stream.read(length))
    whole = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
    tensors = {}
    for name, entry in table.items():
        if name == "__metadata__":  # which may be null
            continue
        dtype, (start, end) = _DTYPES.get(entry["dtype"]), entry["data_offsets"]
        # rare, not where a view may begin, or empty
        if dtype is None or (start + length) % dtype.itemsize or start == end:
            tensors[name] = file.get_tensor(name)
        else:
            tensors[name] = whole[8 + length + start : 8 + length + end].view(dtype).view(entry["shape"])
    return tensors


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


def part_weights(folder: Path, variant: str | None = None) -> tuple[dict[str, torch.Tensor], str | None]:
    """(tensors, stem of the file's name) of a diffusers or transformers part, whole or in shards; None: no weights.

    variant   as `chosen_variant` takes it
    Raises ValueError as `read_weights`, FileNotFoundError for a shard that is missing.
    """
    stored = _stored(folder)
    if not stored:
        return {}, None
    kinds = stored[chosen_variant(folder, variant)]
    stem, ending = min(kinds, key=lambda kind: (STEMS.index(kind[0]), _ENDINGS.index(kind[1])))
    return {k: v for file in kinds[stem, ending] for k, v in read_weights(folder / file)[0].items()}, stem


def chosen_variant(folder: Path, variant: str | None = None) -> str | None:
    """The variant of a part's weights to take: the one asked for, the plain ones (None), or the only one that is there.

    A part that lacks the one asked for and has plain weights gives these, as in diffusers. Raises ValueError naming
    those that are there, where that leaves a choice.
    """
    there = _stored(folder)
    if variant in there or not there:
        return variant if there else None
    if None in there:
        return None
    names = sorted(there)
    if variant is None and len(names) == 1:
        return names[0]
    has = f"{folder} has the weights of {'variants' if len(names) > 1 else 'the variant'} {', '.join(names)} alone"
    raise ValueError(f"{has}; name one: variant={names[0]!r} (--variant {names[0]})")


def check_variant(folder: Path, variant: str | None) -> None:
    """Raises ValueError for a variant that no part of a folder has."""
    places = [folder, *sorted(path for path in folder.iterdir() if path.is_dir())]
    there = {name for place in places for name in _stored(place)}
    if variant is not None and variant not in there:
        names = ", ".join(sorted(name for name in there if name)) or "none"
        raise ValueError(f"{folder} has no weights of the variant {variant!r}; its variants: {names}")


_FILE = re.compile(
    rf"({'|'.join(STEMS)})(?:\.([^.]+?))?(-\d+-of-\d+)?(?:\.([^.]+))?({'|'.join(map(re.escape, _ENDINGS))})"
)
_INDEX = re.compile(rf"({'|'.join(STEMS)})({'|'.join(map(re.escape, _ENDINGS))})\.index(?:\.([^.]+))?\.json")


def _stored(folder: Path) -> dict[str | None, dict[tuple[str, str], list[str]]]:
    """{variant: {(stem, ending): the files that it is in}} of a part's weights; a whole file goes before shards."""
    found: dict[str | None, dict[tuple[str, str], list[str]]] = {}
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    matches = [match for name in names if (match := _FILE.fullmatch(name))]
    for stem, early, shard, late, ending in (match.groups() for match in matches):
        if not shard and not (early and late):
            found.setdefault(early or late, {})[stem, ending] = [
                f"{stem}{f'.{early or late}' * bool(early or late)}{ending}"
            ]
    for name, match in ((name, match) for name in names if (match := _INDEX.fullmatch(name))):
        stem, ending, variant = match.groups()
        files = sorted(set(read_json(folder / name)["weight_map"].values()))
        found.setdefault(variant, {}).setdefault((stem, ending), files)
    for match in matches:  # shards whose index is lost
        stem, early, shard, late, ending = match.groups()
        if shard:
            kinds = found.setdefault(early or late, {})
            if (stem, ending) not in kinds:
                kinds[stem, ending] = _all_shards(match)
    return found


def _all_shards(match: re.Match) -> list[str]:
    """The names of a shard and of its siblings."""
    width, count = len(match[3].split("-")[1]), match[3].split("-")[3]
    before, after = match.string[: match.start(3)], match.string[match.end(3) :]
    return [f"{before}-{i:0{width}}-of-{count}{after}" for i in range(1, int(count) + 1)]
