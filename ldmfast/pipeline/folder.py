"""A pipeline as a folder: diffusers' layout, with conditioner/ and ldmfast.json beside it.

    unet/ vae/ scheduler/ model_index.json    diffusers' own
    conditioner/                              what turns inputs into what the denoiser is conditioned on
    ldmfast.json                              the classes of the autoencoder and the conditioner, the default guidance

A folder without conditioner/ is a text model whose encoder ldmfast.json names; one that names another kind is refused.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from ldmfast import files
from ldmfast.conditioning.base import Conditioner, load_conditioner
from ldmfast.conditioning.text import TextEncoder
from ldmfast.diffusion import catalogue
from ldmfast.released.weights import check_variant, chosen_variant


def load_parts(
    folder: str | Path,
    *,
    text_encoder: str | Path | None = None,
    conditioner: Conditioner | None = None,
    dtype: torch.dtype = torch.float32,
    variant: str | None = None,
) -> dict[str, Any]:
    """{"unet", "vae", "scheduler", "conditioner", "guidance"?} of a saved pipeline.

    text_encoder  "minilm", a hub name or a folder, in place of the one that the pipeline names
    conditioner   in place of the saved one, which is not read then
    variant       of the networks' weights, such as "fp16"
    Raises FileNotFoundError if a part is missing, ValueError if one is damaged, OSError without a text encoder.
    """
    folder = Path(folder)
    for part in ("unet/config.json", "vae/config.json", "scheduler/scheduler_config.json"):
        if not (folder / part).is_file():
            raise FileNotFoundError(f"{folder} is not a saved pipeline: it has no {part}")
    check_variant(folder, variant)
    extra = folder / "ldmfast.json"
    settings = files.read_json(extra) if extra.is_file() else {}
    parts = {name: _network(folder / name, dtype, variant) for name in ("unet", "vae")}
    parts["scheduler"] = _scheduler(folder / "scheduler")
    if conditioner is None:
        conditioner = _conditioner(folder / "conditioner", settings, text_encoder)
    parts["conditioner"] = conditioner
    return {**parts, **({"guidance": settings["guidance"]} if "guidance" in settings else {})}


def _conditioner(folder: Path, settings: dict, text_encoder) -> Conditioner:
    if not folder.is_dir():
        named = settings.get("conditioner", TextEncoder.__name__)
        if named != TextEncoder.__name__:
            raise FileNotFoundError(f"{folder} is missing: the {named} that ldmfast.json names")
        return TextEncoder.from_pretrained(text_encoder or settings.get("text_encoder", "minilm"))
    if text_encoder is None:
        return load_conditioner(folder)
    kind = files.read_json(folder / "config.json").get("_class_name")
    if kind != "TextEncoder":
        raise ValueError(f"text_encoder={text_encoder!r}, but {folder} is a {kind}, which has no other to replace")
    return TextEncoder.from_pretrained(text_encoder)


def _scheduler(folder: Path) -> diffusers.SchedulerMixin:
    name = files.read_json(folder / "scheduler_config.json").get("_class_name", "DDIMScheduler")
    try:
        return catalogue.scheduler(name).from_pretrained(folder)
    except ValueError as error:
        raise ValueError(f"{folder} could not be loaded: {files.first_line(error)}") from error


def _network(folder: Path, dtype: torch.dtype, variant: str | None) -> nn.Module:
    name = files.read_json(folder / "config.json").get("_class_name")
    variant = chosen_variant(folder, variant)
    try:
        return catalogue.network(name).from_pretrained(folder, torch_dtype=dtype, variant=variant)
    except Exception as error:  # diffusers and safetensors raise many types for a damaged file
        raise ValueError(f"{folder} could not be loaded: {files.first_line(error)}") from error


def save_parts(folder: str | Path, *, dtype: torch.dtype | None = None, **parts: Any) -> None:
    """Write what `load_parts` reads. `dtype` converts the weights in the files only.

    The folder holds all of the old or all of the new pipeline at every moment; what it holds beside a pipeline's parts
    stays.
    parts  unet, vae, scheduler, conditioner, guidance
    """
    with files.replacing_folder(Path(folder).resolve(), keep=True) as partial:
        _write_parts(partial, dtype=dtype, **parts)


def _write_parts(folder, *, unet, vae, scheduler, conditioner, guidance, dtype):
    conditioner.save_pretrained(folder / "conditioner", dtype=dtype)  # first: it may refuse
    for name, network in (("unet", unet), ("vae", vae)):
        module = copy.deepcopy(network)  # a cast there and back would round the live weights
        torch.nn.Module.to(module, dtype or module.dtype).save_pretrained(folder / name)
        _forget_origin(folder / name / "config.json")
    scheduler.save_pretrained(folder / "scheduler")
    settings = {"conditioner": type(conditioner).__name__, "autoencoder": type(vae).__name__, "guidance": guidance}
    if isinstance(conditioner, TextEncoder):
        settings["text_encoder"] = conditioner.settings["name"]
    index = _model_index(unet, vae, scheduler, conditioner)
    for name, content in (("ldmfast.json", settings), ("model_index.json", index)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def _forget_origin(path):
    """Drop the path that the part was once loaded from: it means nothing elsewhere."""
    settings = files.read_json(path)
    settings.pop("_name_or_path", None)
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def _stock_name(part):
    """diffusers' name of a network, ours or stock's own."""
    return getattr(part, "stock", type(part)).__name__


def _model_index(unet, vae, scheduler, conditioner):
    """For a text model what StableDiffusionPipeline.from_pretrained(folder, text_encoder=..., tokenizer=...) reads."""
    index = {
        "_class_name": "LatentDiffusionPipeline",
        "_diffusers_version": diffusers.__version__,
        "scheduler": ["diffusers", type(scheduler).__name__],
        "unet": ["diffusers", _stock_name(unet)],
        "vae": ["diffusers", _stock_name(vae)],
    }
    if not isinstance(conditioner, TextEncoder) or not isinstance(vae, diffusers.AutoencoderKL):
        return index
    absent = ("feature_extractor", "image_encoder", "safety_checker", "text_encoder", "tokenizer")
    text = {"_class_name": "StableDiffusionPipeline", "requires_safety_checker": False}
    return dict(sorted({**index, **text, **{name: [None, None] for name in absent}}.items()))
