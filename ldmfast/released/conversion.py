"""The two layouts of a latent diffusion model, one into the other and back, every tensor bit-equal.

report = convert("model.ckpt", "model/")             # a released single file into a diffusers folder
report = convert("model/", "model.safetensors")      # and back
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from ldmfast import files
from ldmfast.released import diffusers_folder as folders
from ldmfast.released.model import Model
from ldmfast.released.parts import to_released
from ldmfast.released.read import HEADER, check_missing, read

_LARGEST_CONFIG = 100_000  # bytes; vocabularies are larger, and no configuration


def convert(
    source: str | Path,
    target: str | Path,
    *,
    ema: bool = False,
    config: dict | str | Path | None = None,
    allow_missing: bool = False,
    variant: str | None = None,
) -> list[str]:
    """Write `target` in the layout that `source` does not have.

    source         a released file, or a folder in diffusers' layout
    target         a folder, or a .safetensors or .ckpt
    ema            the averaged denoiser in the folder's unet/; the plain one stays beside it
    config         the original YAML (its path, text or content), for what the file and its family leave open
    allow_missing  go on without the tensors that the source should have and has not
    variant        of a folder's weights, such as "fp16"
    returns        a line for each thing worth knowing: what it is, what was put beside the model

    Raises ValueError, FileNotFoundError in one sentence; nothing is written then.
    """
    source, target = Path(source), Path(target)
    to_file = target.suffix in (".safetensors", ".ckpt")
    if to_file != source.is_dir():
        raise ValueError(
            f"{source} to {target}: one must be a folder and the other a .safetensors or .ckpt file; "
            "convert changes the layout"
        )
    if to_file and (ema or config is not None):
        raise ValueError("ema and config are for reading a released file; the folder has its own configuration")
    model = read(source, ema=ema, config=config, variant=variant)
    check_missing(source, model, allow_missing)
    if to_file:
        if target.exists():
            raise ValueError(f"{target} exists already; name another, or remove it")
        _write_file(model, source, target)
    else:
        folders.write_folder(model, target)
    return report(model)


def report(model: Model) -> list[str]:
    lines = [f"{' or '.join(model.names) or 'a model of no known family'}: " + ", ".join(_counts(model))]
    lines += [f"missing, and random when loaded: {name}" for name in model.missing]
    return lines + model.guesses + model.notes


def _counts(model: Model) -> list[str]:
    return [f"{where or 'network'} {len(part.tensors)}" for where, part in model.parts.items() if part.tensors]


def _write_file(model: Model, source: Path, target: Path) -> None:
    known = len(model.missing)
    tensors = to_released(model)
    del model.missing[known:]  # the same ones, now by their place
    header = json.dumps({"configs": _configs(source), "legacy": model.record["legacy"]})
    with files.replacing(target) as partial:
        if target.suffix == ".safetensors":
            folders.save(tensors, partial, {HEADER: header})
        else:
            torch.save({"state_dict": tensors, HEADER: header}, partial)


def _configs(source: Path) -> dict[str, str]:
    """The folder's small JSON files, by their place in it; the record of a released origin is not one of them."""
    own = (folders.RECORD,)
    paths = sorted(p for p in source.rglob("*.json") if p.name not in own and not p.name.endswith(".index.json"))
    return {
        str(p.relative_to(source)): p.read_text()
        for p in paths
        if p.stat().st_size < _LARGEST_CONFIG and "tokenizer" not in p.relative_to(source).parts[0]
    }
