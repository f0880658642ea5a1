"""From a name, a folder or a file to the parts of a pipeline: what `ldmfast.load` and `from_pretrained` have in common.

A folder as ldmfast saves it is read by folder.py; anything else by released/, as a table of tensors and configurations
that become live parts here.
"""

from __future__ import annotations

import inspect
import os
import warnings
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from ldmfast import files, shipped
from ldmfast.conditioning.base import Conditioner
from ldmfast.conditioning.text import TextEncoder
from ldmfast.diffusion import catalogue
from ldmfast.models.checks.head_counts import warn_of_heads
from ldmfast.pipeline.folder import load_parts
from ldmfast.pipeline.text_towers import join_text_towers, text_tower
from ldmfast.released.conditioner_parts import make_conditioner
from ldmfast.released.diffusers_folder import pipeline_class
from ldmfast.released.model import Model, Part
from ldmfast.released.read import check_missing, read

# what diffusers' own pipelines set, whatever an old scheduler_config.json says or leaves out
OUTDATED = {
    "StableDiffusionPipeline": {"steps_offset": 1, "clip_sample": False},
    "StableDiffusionInpaintPipeline": {"steps_offset": 1, "skip_prk_steps": True},
}
_PLACES = {"": "", "unet": "unet", "vae": "vae", "vqvae": "vae"}  # where a folder has a network -> what it is here


def assemble(
    source: str | Path,
    *,
    text_encoder: str | Path | None = None,
    ema: bool = False,
    config: dict | str | Path | None = None,
    dtype: torch.dtype | None = torch.float32,
    allow_missing: bool = False,
    tokenizer: str | Path | None = None,
    autoencoder: str | Path | None = None,
    conditioner: Conditioner | None = None,
    variant: str | None = None,
) -> dict[str, Any] | nn.Module | diffusers.DiffusionPipeline:
    """The arguments of a LatentDiffusionPipeline; for a model that is none, what it is: see `ldmfast.load`."""
    path = _located(source)
    _check_options(dtype, conditioner)
    if path.is_dir() and (ema or config is not None):
        raise ValueError("ema and config are for a released file; a folder has its own weights and configuration")
    if text_encoder is not None and conditioner is not None:
        raise ValueError(f"text_encoder={str(text_encoder)!r} and conditioner were both given; give one")
    if _is_ours(path) and autoencoder is None:
        return _with_encoder(path, _ours(path, text_encoder, conditioner, dtype, tokenizer, variant))
    model = _published(path, ema, config, allow_missing, variant)
    networks = {_PLACES[name]: network(part, dtype) for name, part in model.parts.items() if name in _PLACES}
    for made in networks.values() if path.is_dir() else ():
        made.register_to_config(_name_or_path=str(path))  # as diffusers does; verify reads the weights there
    for made in networks.values():
        warn_of_heads(made, path)
    if "" in networks:
        if text_encoder is not None:
            raise ValueError(f"text_encoder={str(text_encoder)!r}, but {path} is an autoencoder or a denoiser alone")
        return networks[""]
    if autoencoder is not None and "vae" in networks:
        raise ValueError(f"autoencoder={str(autoencoder)!r}, but {path} has an autoencoder of its own")
    if "vae" not in networks:
        networks["vae"] = _autoencoder(path, autoencoder, dtype)
    parts = {**networks, "scheduler": _scheduler(path, model)}
    towers = {name: text_tower(part, dtype) for name, part in model.parts.items() if name.startswith("text_encoder")}
    if towers and conditioner is None:
        if text_encoder is not None:
            raise _has_its_own(path, text_encoder)
        return join_text_towers(path, model, parts, towers, tokenizer)
    parts["conditioner"] = _conditioner(path, model, text_encoder, dtype) if conditioner is None else conditioner
    return _with_encoder(path, parts)


def _located(source) -> Path:
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"the model is {source!r}, expected the name of one that ships, a folder or a file")
    if not str(source):
        raise ValueError("the model is an empty name, expected that of one that ships, a folder or a file")
    files.recover(source)
    path = shipped.locate(source)
    if not path.exists():
        known = ", ".join(shipped.names())
        raise FileNotFoundError(f"{source} is neither a file nor a folder; the models that ship are {known}")
    return path


def _check_options(dtype, conditioner) -> None:
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype={dtype!r}, expected a floating type of torch, such as torch.bfloat16, or None")
    if conditioner is not None and not isinstance(conditioner, Conditioner):
        raise TypeError(f"conditioner={conditioner!r}, expected a Conditioner")


def _is_ours(path: Path) -> bool:
    """Whether `path` is a folder of a whole pipeline as ldmfast lays it out."""
    whole = (path / "ldmfast.json").is_file() and (path / "vae").is_dir()
    return whole and not (path / "text_encoder").is_dir()


def _ours(path: Path, text_encoder, conditioner, dtype: torch.dtype | None, tokenizer, variant) -> dict[str, Any]:
    if tokenizer is not None:
        raise ValueError(f"tokenizer={str(tokenizer)!r}, but {path} has no text tower that reads CLIP's tokens")
    options = {"dtype": dtype or torch.float32, "variant": variant}
    return load_parts(path, text_encoder=text_encoder, conditioner=conditioner, **options)


def _published(path: Path, ema: bool, config, allow_missing: bool, variant: str | None) -> Model:
    """What released/ reads there, nothing missing. Warns of tensors without a place, and of what was guessed."""
    model = read(path, ema=ema, config=config, variant=variant)
    check_missing(path, model, allow_missing)
    if unknown := [note for note in model.notes if "(unknown" in note]:
        warnings.warn(f"{path}: {'; '.join(unknown)}", stacklevel=4)
    for guess in model.guesses:
        warnings.warn(f"{path}: {guess}", stacklevel=4)
    return model


def _with_encoder(path: Path, parts: dict[str, Any]) -> dict[str, Any]:
    """The parts, if there is a conditioner for the context that the denoiser attends to. Raises ValueError."""
    conditioner = parts["conditioner"]
    if parts["unet"].config.get("cross_attention_dim") and (conditioner is None or conditioner.mode == "none"):
        raise ValueError(
            f"{path} has no encoder for what its denoiser is conditioned on; give one: conditioner= or text_encoder="
        )
    return parts


def network(part: Part, dtype: torch.dtype | None = None) -> nn.Module:
    """A network over ldmfast's ops with a part's weights, which are taken, not copied, where their dtype stays."""
    kind = catalogue.network(part.config.get("_class_name"))
    with torch.device("meta" if part.complete else "cpu"):
        made = kind.from_config(part.config)
    made.load_state_dict(part.tensors, assign=True, strict=part.complete)
    return nn.Module.to(made, dtype or part.dtype).eval()


def _scheduler(path: Path, model: Model) -> diffusers.SchedulerMixin:
    """Ours where there is one, which steps as diffusers' does; else diffusers' own."""
    config = model.schedule
    try:
        kind = catalogue.scheduler(config.get("_class_name", "DDIMScheduler"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    kind = getattr(kind, "stock", kind)
    known = inspect.signature(kind.__init__).parameters
    outdated = {name: value for name, value in OUTDATED.get(pipeline_class(model), {}).items() if name in known}
    stock = kind.from_config({**config, **outdated})
    return catalogue.take_over(stock) or stock


def _autoencoder(path: Path, source, dtype: torch.dtype | None) -> nn.Module:
    """Out of another file or folder: an autoencoder alone, or a model that has one."""
    if source is None:
        raise ValueError(f"{path} has no autoencoder; give one: autoencoder=FILE or FOLDER")
    found = assemble(source, dtype=dtype)
    found = found["vae"] if isinstance(found, dict) else found
    if not isinstance(found, diffusers.AutoencoderKL | diffusers.VQModel):
        raise ValueError(f"autoencoder={str(source)!r} is a {type(found).__name__}, not an autoencoder")
    return found


def _conditioner(path: Path, model: Model, text_encoder, dtype: torch.dtype | None) -> Conditioner | None:
    """The model's own, or the text encoder that is given in its place; None if there is neither."""
    part = model.parts.get("conditioner")
    if text_encoder is not None:
        if part is not None and part.config["_class_name"] not in ("TextEncoder", "Unconditional"):
            raise _has_its_own(path, text_encoder)
        return TextEncoder.from_pretrained(str(text_encoder))
    if part is None:
        return None
    conditioner = make_conditioner(part.config)
    if part.tensors:
        conditioner.load_state_dict(part.tensors, assign=True, strict=part.complete)
    return conditioner.to(dtype or part.dtype).eval()


def _has_its_own(path: Path, text_encoder) -> ValueError:
    return ValueError(f"text_encoder={str(text_encoder)!r}, but {path} has an encoder of its own")
