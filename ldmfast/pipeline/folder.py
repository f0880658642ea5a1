"""A pipeline as a folder: diffusers' layout, with conditioner/ and ldmfast.json beside it.

    unet/ vae/ scheduler/ model_index.json    diffusers' own
    conditioner/                              what turns inputs into what the denoiser is told
    ldmfast.json                              the classes of the first stage and the conditioner, the default guidance

A folder without conditioner/ is a text model whose encoder ldmfast.json names.
"""

from __future__ import annotations

import copy
import importlib
import json
import os
import shutil
from pathlib import Path

import diffusers
import torch

from ldmfast import shipped
from ldmfast.conditioning.base import load_conditioner
from ldmfast.conditioning.text import TextEncoder

# the class that a part's config.json names -> ours
NETWORKS = {
    "AutoencoderKL": ("ldmfast.models", "AutoencoderKL"),
    "UNet": ("ldmfast.models", "UNet"),
    "UNet2D": ("ldmfast.models.unet2d", "UNet2D"),
    "UNet2DConditionModel": ("ldmfast.models", "UNet"),
    "UNet2DModel": ("ldmfast.models.unet2d", "UNet2D"),
    "VQModel": ("ldmfast.models.vq", "VQModel"),
}
SCHEDULERS = {
    "DDIMScheduler": ("ldmfast.diffusion.ddim", "DDIMScheduler"),
    "DDPMScheduler": ("ldmfast.diffusion.ddpm", "DDPMScheduler"),
    "PNDMScheduler": ("ldmfast.diffusion.pndm", "PNDMScheduler"),
}


def load_parts(folder, *, text_encoder=None, dtype=torch.float32):
    """{"unet", "vae", "scheduler", "conditioner", "guidance"?} of a saved pipeline.

    text_encoder  "minilm", a hub name or a folder, in place of the one that the pipeline names
    Raises FileNotFoundError if a part is missing, ValueError if one is damaged, OSError without a text encoder.
    """
    folder = Path(folder)
    for part in ("unet/config.json", "vae/config.json", "scheduler/scheduler_config.json"):
        if not (folder / part).is_file():
            known = "" if folder.exists() else f"; the models that ship are {', '.join(shipped.names())}"
            raise FileNotFoundError(f"{folder} is not a saved pipeline: it has no {part}{known}")
    extra = folder / "ldmfast.json"
    settings = json.loads(extra.read_text()) if extra.is_file() else {}
    parts = {name: _load(_class_of(folder / name), folder / name, dtype) for name in ("unet", "vae")}
    parts["scheduler"] = _scheduler(folder / "scheduler")
    parts["conditioner"] = _conditioner(folder / "conditioner", settings, text_encoder)
    return {**parts, **({"guidance": settings["guidance"]} if "guidance" in settings else {})}


def _conditioner(folder, settings, text_encoder):
    if not folder.is_dir():
        return TextEncoder.from_pretrained(text_encoder or settings.get("text_encoder", "minilm"))
    if text_encoder is None:
        return load_conditioner(folder)
    kind = json.loads((folder / "config.json").read_text()).get("_class_name")
    if kind != "TextEncoder":
        raise ValueError(f"text_encoder={text_encoder!r}, but {folder} is a {kind}, which has no other to replace")
    return TextEncoder.from_pretrained(text_encoder)


def _class_of(folder):
    name = json.loads((folder / "config.json").read_text()).get("_class_name")
    if name not in NETWORKS:
        raise ValueError(f"{folder} is a {name}; expected one of {', '.join(NETWORKS)}")
    home, kind = NETWORKS[name]
    return getattr(importlib.import_module(home), kind)


def _scheduler(folder):
    """Ours of that name, or else diffusers' own."""
    name = json.loads((folder / "scheduler_config.json").read_text()).get("_class_name", "DDIMScheduler")
    home, kind = SCHEDULERS.get(name, ("diffusers", name))
    return getattr(importlib.import_module(home), kind).from_pretrained(folder)


def _load(kind, folder, dtype):
    try:
        return kind.from_pretrained(folder, torch_dtype=dtype)
    except Exception as error:  # diffusers and safetensors raise many types for a damaged file
        reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
        raise ValueError(f"{folder} could not be loaded: {reason}") from error


def save_parts(folder, *, dtype=None, **parts):
    """Write what `load_parts` reads. `dtype` converts the weights in the files only.

    All of it is written beside `folder` and then moved in, so that what was there stays until it is complete; what the
    folder holds beside a pipeline's parts is left alone.
    parts  unet, vae, scheduler, conditioner, guidance
    """
    folder = Path(folder).resolve()
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _write_parts(partial, dtype=dtype, **parts)
        folder.mkdir(exist_ok=True)
        for written in list(partial.iterdir()):
            target = folder / written.name
            if target.is_dir():
                os.replace(target, partial / f"{written.name}.old")
            os.replace(written, target)
    finally:
        shutil.rmtree(partial)


def _write_parts(folder, *, unet, vae, scheduler, conditioner, guidance, dtype):
    conditioner.save_pretrained(folder / "conditioner", dtype=dtype)  # first: it may refuse
    for name, network in (("unet", unet), ("vae", vae)):
        module = copy.deepcopy(network)  # a cast there and back would round the live weights
        torch.nn.Module.to(module, dtype or module.dtype).save_pretrained(folder / name)
        _forget_origin(folder / name / "config.json")
    scheduler.save_pretrained(folder / "scheduler")
    settings = {"conditioner": type(conditioner).__name__, "first_stage": type(vae).__name__, "guidance": guidance}
    if isinstance(conditioner, TextEncoder):
        settings["text_encoder"] = conditioner.settings["name"]
    index = _model_index(unet, vae, scheduler, conditioner)
    for name, content in (("ldmfast.json", settings), ("model_index.json", index)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def _forget_origin(path):
    """Drop the path that the part was once loaded from: it means nothing elsewhere."""
    settings = json.loads(path.read_text())
    settings.pop("_name_or_path", None)
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def _model_index(unet, vae, scheduler, conditioner):
    """For a text model what StableDiffusionPipeline.from_pretrained(folder, text_encoder=..., tokenizer=...) reads."""
    index = {
        "_class_name": "LatentDiffusionPipeline",
        "_diffusers_version": diffusers.__version__,
        "scheduler": ["diffusers", type(scheduler).__name__],
        "unet": ["diffusers", unet.stock.__name__],
        "vae": ["diffusers", vae.stock.__name__],
    }
    if not isinstance(conditioner, TextEncoder) or not isinstance(vae, diffusers.AutoencoderKL):
        return index
    absent = ("feature_extractor", "image_encoder", "safety_checker", "text_encoder", "tokenizer")
    text = {"_class_name": "StableDiffusionPipeline", "requires_safety_checker": False}
    return dict(sorted({**index, **text, **{name: [None, None] for name in absent}}.items()))
