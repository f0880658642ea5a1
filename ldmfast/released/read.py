"""Any published model as a `Model` (model.py): a single file in the released layout, or a diffusers folder."""

from __future__ import annotations

import json
from pathlib import Path

from ldmfast import files
from ldmfast.released.diffusers_folder import read_folder
from ldmfast.released.model import Model
from ldmfast.released.single_file import from_released
from ldmfast.released.weights import read_weights

_ABOUT = "modelspec."  # a safetensors file's description of itself
HEADER = "ldmfast"  # in a safetensors file's metadata: the folder's configurations


def read(
    source: str | Path, *, ema: bool = False, config: dict | str | Path | None = None, variant: str | None = None
) -> Model:
    """The parts of a released file or a diffusers folder. Raises FileNotFoundError, ValueError."""
    source = Path(source)
    files.recover(source)
    if source.is_dir():
        return read_folder(source, variant)
    if not source.is_file():
        raise FileNotFoundError(f"{source} is neither a file nor a folder")
    if variant is not None:
        raise ValueError(f"variant={variant!r} is for a folder; {source} is a file")
    tensors, others = read_weights(source)
    try:
        header = json.loads(others.pop(HEADER, "{}"))
        model = from_released(tensors, config, ema=ema, header=header, said=others)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    left = sorted(name for name in others if name != "format" and not name.startswith(_ABOUT))
    if left:
        model.notes.append(f"not tensors, left out: {', '.join(left)}")
    return model


def check_missing(source: Path, model: Model, allowed: bool) -> None:
    """Raises ValueError for weights that the source should have and has not, unless that is allowed."""
    if not model.missing or allowed:
        return
    more = f" and {len(model.missing) - 3} more" if len(model.missing) > 3 else ""
    raise ValueError(
        f"{source} lacks {len(model.missing)} of this model's weights: {', '.join(model.missing[:3])}{more}; "
        "they would be random. allow_missing=True (--allow-missing) takes it so"
    )
