"""`ldmfast.load`: any latent diffusion model, from a folder or a single file, as a pipeline that is ready to draw.

pipe = ldmfast.load("v1-5-pruned.safetensors")            # Stable Diffusion 1, 2, XL; their inpainting models
pipe = ldmfast.load("celeba256/model.ckpt", ema=True)     # the models released with the LDM paper
vae = ldmfast.load("vq-f8/model.ckpt")                    # a first stage alone
"""

from __future__ import annotations

import warnings
from pathlib import Path

import diffusers
import torch
from torch import nn

from ldmfast.diffusion.ddim import DDIMScheduler
from ldmfast.models.layers import weights_channels_last
from ldmfast.released import conversion
from ldmfast.released.conditioner_parts import make_conditioner
from ldmfast.released.diffusers_folder import pipeline_class
from ldmfast.released.parts import Model, Part, network_class

CLIP = "openai/clip-vit-large-patch14"  # whose tokenizer every Stable Diffusion uses


def load(
    path,
    *,
    ema=False,
    config=None,
    dtype=torch.float32,
    allow_missing=False,
    tokenizer=None,
    first_stage=None,
    conditioner=None,
):
    """A ready model: denoiser, first stage, conditioner and noise schedule.

    path           a released .safetensors or .ckpt, or a folder in diffusers' layout
    ema            the averaged denoiser of a released file; without it the plain one
    config         the original YAML (its path or content) of a released file whose family is not known, or to override
                   what its family says: heads, betas, scale factor, parameterization
    dtype          of the weights in memory; None leaves them as they are in the file (float32 from a folder that
                   ldmfast trained)
    allow_missing  take weights that the file lacks at random
    tokenizer      CLIP's, a folder or a hub name, for a file without one; default: openai/clip-vit-large-patch14
    first_stage    a file or folder with the first stage, for a denoiser saved without one
    conditioner    a Conditioner, for a denoiser saved without one
    returns        a LatentDiffusionPipeline; a diffusers pipeline over ldmfast's networks where the model needs more
                   than a prompt and a mask: depth, editing, SDXL's refiner; a network if there is only that

    Raises ValueError, FileNotFoundError, OSError in one sentence naming the file.
    """
    path = Path(path)
    if path.is_dir() and (ema or config is not None):
        raise ValueError("ema and config are for a released file; a folder has its own weights and configuration")
    if _is_ours(path) and first_stage is None and conditioner is None:
        if tokenizer is not None:
            raise ValueError(f"tokenizer={str(tokenizer)!r}, but {path} has no text tower that reads CLIP's tokens")
        pipe = _pipeline_of_ours().from_pretrained(path, dtype=dtype or torch.float32)
        _require_encoder(path, pipe.unet, pipe.conditioner)
        return pipe
    model = conversion.read(path, ema=ema, config=config)
    conversion.check_missing(path, model, allow_missing)
    if unknown := [note for note in model.notes if "(unknown" in note]:
        warnings.warn(f"{path}: {'; '.join(unknown)}", stacklevel=2)
    names = {"": "", "unet": "unet", "vae": "vae", "vqvae": "vae"}
    networks = {names[name]: build(part, dtype) for name, part in model.parts.items() if name in names}
    if "" in networks:
        return networks[""]
    if "vae" not in networks:
        if first_stage is None:
            raise ValueError(f"{path} has no first stage; give one: first_stage=FILE or FOLDER")
        networks["vae"] = load(first_stage, dtype=dtype)
    scheduler = _scheduler(model.schedule)
    texts = {name: _text_encoder(part, dtype) for name, part in model.parts.items() if name.startswith("text_encoder")}
    if texts and conditioner is None:
        return _text_pipeline(path, model, networks, scheduler, texts, tokenizer)
    if conditioner is None:
        conditioner = _conditioner(model.parts.get("conditioner"), dtype)
        _require_encoder(path, networks["unet"], conditioner)
    return _pipeline(networks, scheduler, conditioner)


def _is_ours(path: Path) -> bool:
    """Whether `path` is a folder of a whole pipeline as ldmfast lays it out."""
    whole = (path / "ldmfast.json").is_file() and (path / "vae").is_dir()
    return whole and not (path / "text_encoder").is_dir()


def _require_encoder(path: Path, unet, conditioner) -> None:
    if unet.config.get("cross_attention_dim") and (conditioner is None or conditioner.mode == "none"):
        raise ValueError(f"{path} has no encoder for what its denoiser is told; give one: conditioner=")


def build(part: Part, dtype=None):
    """A network over ldmfast's ops with a part's weights, which are taken, not copied, where their dtype stays."""
    kind = network_class(part.config)
    with torch.device("meta" if part.complete else "cpu"):
        network = kind.from_config(part.config)
    network.load_state_dict(part.tensors, assign=True, strict=part.complete)
    weights_channels_last(network)
    return (network if dtype is None else nn.Module.to(network, dtype)).eval()


def _scheduler(config: dict):
    name = config.get("_class_name", "DDIMScheduler")
    kind = DDIMScheduler if name == "DDIMScheduler" else getattr(diffusers, name, None)
    if kind is None:
        raise ValueError(f"the scheduler {name} is not one of diffusers'")
    return kind.from_config(config)


def _conditioner(part: Part | None, dtype):
    if part is None:
        return None
    conditioner = make_conditioner(part.config)
    if part.tensors:
        conditioner.load_state_dict(part.tensors, assign=True, strict=part.complete)
    return (conditioner if dtype is None else conditioner.to(dtype)).eval()


def _text_encoder(part: Part, dtype):
    """CLIP's text tower, from a table of a saved one."""
    import transformers

    name = part.config["architectures"][0]
    model = getattr(transformers, name)(transformers.CLIPTextConfig.from_dict(part.config))
    prefixed = any(key.startswith("text_model.") for key in model.state_dict())
    own = {key if prefixed else key.removeprefix("text_model."): value for key, value in part.tensors.items()}
    model.load_state_dict(own, assign=True, strict=part.complete)
    return (model if dtype is None else model.to(dtype)).eval().requires_grad_(False)


def _pipeline_of_ours():
    from ldmfast.pipeline import LatentDiffusionPipeline

    return LatentDiffusionPipeline


def _pipeline(networks: dict, scheduler, conditioner, **guidance):
    return _pipeline_of_ours()(networks["unet"], networks["vae"], scheduler, conditioner, **guidance)


def _text_pipeline(path: Path, model: Model, networks: dict, scheduler, texts: dict, tokenizer):
    from ldmfast.conditioning.base import Hybrid
    from ldmfast.conditioning.spatial import MaskedImage
    from ldmfast.conditioning.text import TextEncoder
    from ldmfast.conditioning.text_sdxl import TwoTextEncoders

    tokenizers = {n: _tokenizer(path, n.replace("text_encoder", "tokenizer"), tokenizer, texts[n]) for n in texts}
    kind = pipeline_class(model)
    if kind is None:
        channels = model.parts["unet"].config["in_channels"]
        raise ValueError(f"{path}: no pipeline takes a prompt for a U-Net of {channels} channels")
    if kind in ("StableDiffusionPipeline", "StableDiffusionInpaintPipeline") or "XL" in kind and len(texts) == 2:
        if "XL" in kind:
            both = "text_encoder", "text_encoder_2"
            conditioner = TwoTextEncoders([texts[n] for n in both], [tokenizers[n] for n in both], name=str(path))
        else:
            encoder = texts["text_encoder"]
            tokens = encoder.config.max_position_embeddings
            conditioner = TextEncoder(encoder, tokenizers["text_encoder"], tokens, name=str(path))
        if "Inpaint" in kind:
            joined = networks["unet"].config.in_channels - networks["unet"].config.out_channels
            conditioner = Hybrid(text=conditioner, picture=MaskedImage(joined, style="sd"))
        return _pipeline(networks, scheduler, conditioner, guidance=5.0 if "XL" in kind else 7.5)  # diffusers' own
    parts = {**networks, **texts, "scheduler": scheduler}
    parts |= {name.replace("text_encoder", "tokenizer"): value for name, value in tokenizers.items()}
    if "XL" in kind:
        parts |= {name: None for name in ("text_encoder", "tokenizer") if name not in parts}
    elif "Depth" in kind:
        parts |= {"depth_estimator": None, "feature_extractor": None}
    else:
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return getattr(diffusers, kind)(**parts)


class AbsentTokenizer:
    """Stands where a tokenizer should be; asked for tokens, it says what is missing."""

    def __init__(self, reason: str):
        self.reason = reason

    def __call__(self, *args, **kwargs):
        raise OSError(self.reason)


def _tokenizer(path: Path, part: str, named, encoder):
    """The folder's, the one that is named, or CLIP's; if none is there, one that says so when it is asked."""
    from transformers import CLIPTokenizer

    own = path / part
    where = named or (own if own.is_dir() else CLIP)
    try:
        tokenizer = CLIPTokenizer.from_pretrained(str(where))
        if len(tokenizer) <= len(tokenizer.all_special_tokens):  # transformers 5 makes an empty one of nothing
            raise OSError("it has no vocabulary")
    except (OSError, ValueError, TypeError) as error:
        reason = f"the tokenizer {str(where)!r} could not be loaded ({str(error).strip().splitlines()[0][:120]})"
        if named:
            raise OSError(f"{reason}; name a folder with CLIP's vocab.json and merges.txt") from error
        return AbsentTokenizer(f"{reason}; load the model with tokenizer= a folder with vocab.json and merges.txt")
    tokenizer.model_max_length = encoder.config.max_position_embeddings
    if not own.is_dir() and encoder.config.hidden_act == "gelu" and "!" in tokenizer.get_vocab():
        tokenizer.pad_token = "!"  # OpenCLIP's towers (Stable Diffusion 2, SDXL's second) were trained on 0 as padding
    return tokenizer
