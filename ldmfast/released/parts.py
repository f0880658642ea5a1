"""The tensors of a released file into a model's parts, and back.

What has no place in a part is the `rest`, with a sentence for each kind of it.
"""

from __future__ import annotations

import torch

from ldmfast.released.keys import Entry
from ldmfast.released.model import UNET, Model, Part
from ldmfast.released.spellings import dotted

# what a released file holds beside the model, and what that is
_KNOWN_REST = {
    "model_ema.": "averaged weights (ema=True takes them)",
    "loss.": "the autoencoder's discriminator and perceptual network",
    "first_stage_model.loss.": "the autoencoder's discriminator and perceptual network",
    "cond_stage_model.": "parts of the encoder that the model does not read",
    "conditioner.embedders.": "parts of the encoders that the model does not read",
    "ldmfast.": "parts without a place in the released layout",
}
_SCHEDULE = (
    "betas",
    "alphas_cumprod",
    "sqrt_",
    "log_one_minus",
    "posterior_",
    "scale_factor",
    "logvar",
    "lvlb_weights",
)


def ema_name(name: str) -> str:
    """Where the averaged copy of a released tensor is: buffers' names have no dots."""
    return "model_ema." + name.removeprefix("model.").replace(".", "")


def with_averaged(tensors: dict[str, torch.Tensor], ema: bool) -> dict[str, torch.Tensor]:
    """The tensors; where a denoiser's averaged ones are there alone, by the plain names too, for their shapes."""
    if not ema or any(name.startswith(UNET) for name in tensors):
        return tensors
    return tensors | {plain: value for name, value in tensors.items() if (plain := dotted(name))}


def fill(model: Model, tensors: dict[str, torch.Tensor], ema: bool) -> None:
    """Move the tensors into the parts; what is left is the rest. Raises ValueError for shapes that do not fit."""
    if ema and not any(name.startswith("model_ema.diffusion_model") for name in tensors):
        raise ValueError("ema=True, but the file holds no averaged weights (model_ema.)")
    model.record |= {"ema": ema, "names": model.names, "shapes": {}}
    for where, part in model.parts.items():
        for entry in part.entries:
            source = ema_name(entry.released) if ema and where == "unet" else entry.released
            if source not in tensors:
                model.missing.append(source)
                continue
            value = tensors.pop(source)
            if entry.ndim is not None and value.ndim not in (1, entry.ndim):
                model.record["shapes"][source] = list(value.shape)
            _place(part, entry, source, value)
    model.rest = tensors
    model.notes += rest_notes(tensors, {UNET: "the plain weights of the denoiser"} if ema else {})


def _place(part: Part, entry: Entry, source: str, value: torch.Tensor) -> None:
    try:
        values = entry.apply(value)
    except RuntimeError as error:
        raise ValueError(f"{source} has shape {tuple(value.shape)}, which its place does not take") from error
    for key, each in zip(entry.keys, values, strict=True):
        if part.shapes is not None and tuple(each.shape) != part.shapes[key]:
            raise ValueError(f"{source} has shape {tuple(value.shape)}; {key} is {part.shapes[key]}")
        part.tensors[key] = each


def rest_notes(rest: dict, expected: dict[str, str]) -> list[str]:
    """A sentence for each kind of tensor without a place; those of no kind are named.   expected  {prefix: what}"""
    known = _KNOWN_REST | expected
    counts: dict[str, list[str]] = {}
    for name in rest:
        what = next((text for prefix, text in known.items() if name.startswith(prefix)), None)
        what = "the noise schedule" if what is None and name.startswith(_SCHEDULE) else what
        counts.setdefault(what or "unknown", []).append(name)
    notes = []
    for what, names in counts.items():
        shown = f": {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}" if what == "unknown" else ""
        notes.append(f"{len(names)} tensors beside the model ({what}{shown})")
    return notes


def to_released(model: Model) -> dict[str, torch.Tensor]:
    """The parts put together again as a single file's tensors. Raises ValueError if two claim one name."""
    tensors = dict(model.rest)
    ema, shapes = model.record.get("ema", False), model.record.get("shapes", {})
    for where, part in model.parts.items():
        for entry in part.entries:
            name = ema_name(entry.released) if ema and where == "unet" else entry.released
            values = [part.tensors[key] for key in entry.keys if key in part.tensors]
            if len(values) < len(entry.keys):
                model.missing.append(f"{where}: {', '.join(key for key in entry.keys if key not in part.tensors)}")
                continue
            if name in tensors:
                raise ValueError(f"{name} is both a tensor of {where} and one beside the model")
            value = entry.undo(values)
            tensors[name] = value.view(shapes[name]) if name in shapes else value
    return tensors
