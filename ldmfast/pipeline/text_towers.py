"""CLIP's text towers and tokenizers out of a published model, and the pipeline that they make of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NoReturn

import diffusers
import torch
from torch import nn

from ldmfast.conditioning.base import Conditioner
from ldmfast.conditioning.hybrid import Hybrid
from ldmfast.conditioning.spatial import MaskedImage
from ldmfast.conditioning.text import TextEncoder
from ldmfast.conditioning.text_sdxl import TwoTextEncoders
from ldmfast.files import first_line, read_json
from ldmfast.pipeline.clip_tokenizer import CLIP, clip_tokenizer
from ldmfast.released.diffusers_folder import pipeline_class
from ldmfast.released.model import Model, Part


def text_tower(part: Part, dtype: torch.dtype | None) -> nn.Module:
    """CLIP's text tower, from a table of a saved one."""
    import transformers

    name = part.config["architectures"][0]
    model = getattr(transformers, name)(transformers.CLIPTextConfig.from_dict(part.config))
    prefixed = any(key.startswith("text_model.") for key in model.state_dict())
    own = {key if prefixed else key.removeprefix("text_model."): value for key, value in part.tensors.items()}
    model.load_state_dict(own, assign=True, strict=part.complete)
    return model.to(dtype or part.dtype).eval().requires_grad_(False)


def join_text_towers(
    path: Path, model: Model, parts: dict[str, Any], towers: dict[str, nn.Module], tokenizer: str | Path | None
) -> dict[str, Any] | diffusers.DiffusionPipeline:
    """The arguments of a LatentDiffusionPipeline, or diffusers' pipeline where the model takes more than that gives.

    parts   unet, vae, scheduler;   towers  by the name of their folder: text_encoder, text_encoder_2
    """
    kind = pipeline_class(model)
    if kind is None:
        channels = model.parts["unet"].config["in_channels"]
        raise ValueError(f"{path}: no pipeline takes a prompt for a U-Net of {channels} channels")
    tokenizers = {n: _tokenizer(path, n.replace("text_encoder", "tokenizer"), tokenizer, towers[n]) for n in towers}
    if kind in ("StableDiffusionPipeline", "StableDiffusionInpaintPipeline") or "XL" in kind and len(towers) == 2:
        conditioner = _conditioner(path, towers, tokenizers)
        if "Inpaint" in kind:
            joined = parts["unet"].config.in_channels - parts["unet"].config.out_channels
            conditioner = Hybrid(text=conditioner, picture=MaskedImage(joined, style="sd"))
        return {**parts, "conditioner": conditioner, "guidance": 5.0 if "XL" in kind else 7.5}  # diffusers' own
    parts = {**parts, **towers}
    parts |= {name.replace("text_encoder", "tokenizer"): value for name, value in tokenizers.items()}
    return getattr(diffusers, kind)(**parts, **_absent(kind, parts))


def _conditioner(path: Path, towers: dict[str, nn.Module], tokenizers: dict) -> Conditioner:
    if "text_encoder_2" in towers:
        both = "text_encoder", "text_encoder_2"
        index = read_json(path / "model_index.json") if (path / "model_index.json").is_file() else {}
        options = {"name": os.path.abspath(path), "zeros": index.get("force_zeros_for_empty_prompt", True)}
        return TwoTextEncoders([towers[n] for n in both], [tokenizers[n] for n in both], **options)
    tower, tokenizer = towers["text_encoder"], tokenizers["text_encoder"]
    return TextEncoder(tower, tokenizer, tower.config.max_position_embeddings, name=os.path.abspath(path))


def _absent(kind: str, parts: dict[str, Any]) -> dict[str, Any]:
    """What diffusers' pipeline of that name wants to be given, and may be without."""
    if "XL" in kind:
        return {name: None for name in ("text_encoder", "tokenizer") if name not in parts}
    if "Depth" in kind:
        return {"depth_estimator": None, "feature_extractor": None}
    return {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


class AbsentTokenizer:
    """Stands where a tokenizer should be; asked for tokens, it says what is missing."""

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise OSError(self.reason)

    def get_vocab(self) -> NoReturn:
        raise OSError(self.reason)


def _tokenizer(path: Path, part: str, named, tower: nn.Module):
    """The folder's, the one that is named, or CLIP's; if none is there, one that says so when it is asked."""
    own = path / part
    where = named or (own if own.is_dir() else CLIP)
    try:
        tokenizer = clip_tokenizer(where, hub=bool(named))
    except (OSError, ValueError, TypeError) as error:
        reason = f"the tokenizer {str(where)!r} could not be loaded ({first_line(error, 120)})"
        if named:
            raise OSError(f"{reason}; name a folder with CLIP's vocab.json and merges.txt") from error
        return AbsentTokenizer(
            f"{reason}; load the model with tokenizer= a folder with vocab.json and merges.txt, {CLIP!r}, or "
            "'open_clip' where open_clip_torch is installed; on the command line --tokenizer"
        )
    tokenizer.model_max_length = tower.config.max_position_embeddings
    if not own.is_dir() and tower.config.hidden_act == "gelu" and "!" in tokenizer.get_vocab():
        tokenizer.pad_token = "!"  # OpenCLIP's towers (Stable Diffusion 2, SDXL's second) were trained on 0 as padding
    return tokenizer
