"""What `verify` looks at: a pipeline's or a folder's networks as they are, stock's beside them, and their inputs."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from ldmfast import files, shipped
from ldmfast.conditioning.base import Conditioner
from ldmfast.conditioning.condition import Condition
from ldmfast.conditioning.text import TextEncoder
from ldmfast.conditioning.text_sdxl import TwoTextEncoders
from ldmfast.conditioning.transformer import TransformerText
from ldmfast.diffusion import catalogue
from ldmfast.diffusion.configuration import as_it_is
from ldmfast.models.drop_in import DropIn
from ldmfast.models.encode_decode import downsampling
from ldmfast.pipeline.assemble import assemble
from ldmfast.pipeline.pipeline import LatentDiffusionPipeline
from ldmfast.pipeline.text_towers import AbsentTokenizer

LIVE = "live"
TOKENS = 77  # of a condition of random numbers
GUIDANCE = 3.0
WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
_PLACES = {"unet": "unet", "vae": "vae", "vqvae": "vae"}


@dataclass
class Subject:
    """A model, or its networks alone.

    networks   {"unet", "vae"}: ours, live;   pipeline  what they came in, if it was one
    """

    networks: dict[str, DropIn]
    scheduler: diffusers.SchedulerMixin | None = None
    pipeline: Any = None
    notes: list[str] = field(default_factory=list)


def from_source(
    source: str | Path, dtype: torch.dtype, text_encoder: str | None = None, *, networks_only: bool = False
) -> tuple[Subject, Path]:
    """A folder or file as `ldmfast.load` reads it, and where it is. Raises what `ldmfast.load` raises."""
    path = shipped.locate(source)
    bare = text_encoder is None and path.is_dir() and _lacks_a_text_encoder(path) or networks_only
    more = {"conditioner": _RandomContext()} if bare else {"text_encoder": text_encoder}
    found = assemble(path, dtype=dtype, **more)
    return of(LatentDiffusionPipeline(**found) if isinstance(found, dict) else found), path


def _lacks_a_text_encoder(path: Path) -> bool:
    """Whether a pipeline's folder has no text encoder that could be asked: none, or one without its tokenizer."""
    if not (path / "unet").is_dir() or (path / "conditioner").is_dir() or (path / "ldmfast.json").is_file():
        return False
    towers = [tower.name for tower in path.glob("text_encoder*") if tower.is_dir()]
    return not towers or not all((path / t.replace("text_encoder", "tokenizer")).is_dir() for t in towers)


class _RandomContext(Conditioner):
    """Stands where a model's own text encoder is not at hand; `random_condition` is taken in its place."""

    mode = "crossattn"


def of(model: Any) -> Subject:
    """Of a live pipeline, diffusers' or ours, or a network: its networks under our forward, sharing their weights.

    Raises ValueError if none of them is one that ldmfast has, or one is offloaded; TypeError for anything else.
    """
    if isinstance(model, nn.Module):
        parts = {"vae" if isinstance(model, diffusers.AutoencoderKL | diffusers.VQModel) else "unet": model}
    elif isinstance(model, diffusers.DiffusionPipeline):
        parts = model.components
    elif isinstance(model, LatentDiffusionPipeline):
        parts = {"unet": model.unet, "vae": model.vae, "scheduler": model.scheduler}
    else:
        raise TypeError(f"verify takes a pipeline of diffusers' or ldmfast's, or a network; got {type(model).__name__}")
    subject = Subject({}, parts.get("scheduler"), None if isinstance(model, nn.Module) else model)
    for name, part in parts.items():
        if isinstance(part, DropIn):
            subject.networks[_PLACES.get(name, name)] = part
        elif (ours := _view(part)) is not None:
            subject.networks[_PLACES.get(name, name)] = ours
        elif isinstance(part, nn.Module):
            subject.notes.append(
                f"{name} ({type(part).__name__}) is none of ldmfast's networks, and was not looked at."
            )
    if not subject.networks:
        raise ValueError(f"{type(model).__name__} has no {', '.join(catalogue.NETWORKS)} to verify")
    return subject


def _view(part: Any) -> DropIn | None:
    return catalogue.take_over(part) if type(part).__name__ in catalogue.NETWORKS else None


# --- stock's networks -------------------------------------------------------------------------------------------------


def stock_view(ours: DropIn) -> nn.Module:
    """The live network under stock's forward: its very parameters and modules, nothing copied."""
    new = ours.stock.__new__(ours.stock)
    new.__dict__.update(ours.__dict__)
    return new


def stock_of(subject: Subject, against: Any, strict: bool) -> dict[str, tuple[nn.Module, str]]:
    """{network: (stock's, where its weights are from)}.

    against  None: the folder that a network was loaded from; "live"; a folder, file, pipeline or network
    strict   a network that is not the folder's is taken for a changed one, even if most of its tensors differ
    Raises ValueError for a model that lacks a network, or has another one.
    """
    if against is not None and against != LIVE:
        return _others(subject, against)
    found = {}
    for name, ours in subject.networks.items():
        folder = None if against == LIVE else _origin(ours, name)
        stock = None if folder is None else _read_stock(ours, folder)
        if stock is not None and set(stock.state_dict()) != set(ours.state_dict()):
            subject.notes.append(f"{name}: something is attached to it (a LoRA?), so stock's class took it as it is.")
            stock = None
        if stock is not None and not strict and len(changed(ours, stock)) * 2 > len(ours.state_dict()):
            subject.notes.append(
                f"{name}: its weights are no longer those in {folder}; stock's class took it as it is."
            )
            stock = None
        found[name] = (stock_view(ours), "the live weights") if stock is None else (stock, str(folder))
    return found


def _others(subject: Subject, against: Any) -> dict[str, tuple[nn.Module, str]]:
    where = str(against) if isinstance(against, str | os.PathLike) else f"the other {type(against).__name__}"
    found = {}
    if isinstance(against, str | os.PathLike):
        path = shipped.locate(against)
        files.recover(path)
        if not path.exists():
            raise FileNotFoundError(f"against: {against} is neither a file nor a folder")
        folders = {name: _part_folder(path, name) for name in subject.networks}
        if all(folders.values()):
            found = {name: _read_stock(ours, folders[name]) for name, ours in subject.networks.items()}
        else:
            dtype = next(iter(subject.networks.values())).dtype
            other, _ = from_source(path, dtype, networks_only=True)
            found = {name: stock_view(ours) for name, ours in other.networks.items()}
    else:
        found = {name: stock_view(ours) for name, ours in of(against).networks.items()}
    for name, ours in subject.networks.items():
        if name not in found:
            raise ValueError(f"{where} has no {name} to compare with")
        found[name] = found[name].to(ours.dtype) if found[name].dtype != ours.dtype else found[name]
        _same_kind(name, ours, found[name], where)
    return {name: (found[name], where) for name in subject.networks}


def _same_kind(name: str, ours: nn.Module, stock: nn.Module, where: str) -> None:
    mine, theirs = (
        {key: tuple(value.shape) for key, value in network.state_dict().items()} for network in (ours, stock)
    )
    for key in [*mine, *theirs]:
        if mine.get(key) != theirs.get(key):
            raise ValueError(
                f"the {name} of {where} is another network: {key} is {theirs.get(key, 'absent')} there, "
                f"{mine.get(key, 'absent')} here"
            )


def _part_folder(path: Path, name: str) -> Path | None:
    """Where `path` has the network as diffusers writes it, or None."""
    places = [path / place for place, known in _PLACES.items() if known == name] + [path / name, path]
    return next((p for p in places if (p / "config.json").is_file() and _has_weights(p)), None)


def _has_weights(folder: Path) -> bool:
    return any((folder / name).is_file() or (folder / f"{name}.index.json").is_file() for name in WEIGHTS)


def _origin(ours: DropIn, name: str) -> Path | None:
    """The folder that the network was loaded from, where it says so and still has one of its class."""
    said = ours.config.get("_name_or_path")
    folder = _part_folder(Path(said), name) if said and os.path.isdir(said) else None
    if folder is None or files.read_json(folder / "config.json").get("_class_name") != ours.stock.__name__:
        return None
    return folder


def _read_stock(ours: DropIn, folder: Path) -> nn.Module:
    """Stock's class with the weights in the folder, by diffusers' own reader.

    A UNet2D whose heads' widths are a list is one that diffusers refuses: there our reader and stock's forward.
    """
    heads = files.read_json(folder / "config.json").get("attention_head_dim")
    several = ours.stock is diffusers.UNet2DModel and isinstance(heads, list)
    kind = type(ours) if several else ours.stock
    try:
        made = kind.from_pretrained(folder, torch_dtype=ours.dtype, local_files_only=True).eval().to(ours.device)
    except Exception as error:  # diffusers and safetensors raise many types for a damaged file
        raise ValueError(f"{folder} could not be loaded by diffusers: {files.first_line(error)}") from error
    return stock_view(made) if several else made


def changed(ours: nn.Module, stock: nn.Module) -> list[tuple[str, float]]:
    """(tensor, norm of the difference over norm) of those that differ, in the order of the network.

    A weight that was rounded to 16 bits on the way is the same weight.
    """
    found, theirs = [], stock.state_dict()
    for name, mine in ours.state_dict().items():
        other = theirs[name].to(mine.device)
        if torch.equal(mine, other.to(mine.dtype)):
            continue
        if any(torch.equal(mine, other.to(half).to(mine.dtype)) for half in (torch.bfloat16, torch.float16)):
            continue
        size = other.double().norm().item()
        difference = (mine.double() - other.double()).norm().item()
        found.append((name, difference / size if size else float("inf")))
    return found


# --- what goes in -----------------------------------------------------------------------------------------------------


def condition(subject: Subject, prompt: str, size: tuple[int, int], seed: int) -> tuple[Condition, float, str]:
    """(the condition of two pictures, unconditional and conditional; the guidance scale; what it is, in words)."""
    unet, pipe = subject.networks["unet"], subject.pipeline
    if isinstance(pipe, LatentDiffusionPipeline) and not pipe.conditioner.takes_inputs:
        if not pipe.conditioner.takes_pictures:
            return Condition(), 1.0, "unconditional"
    elif isinstance(pipe, LatentDiffusionPipeline) and _reads_text(pipe.conditioner):
        given = Condition.cat([pipe.conditioner.empty(1), pipe.conditioner([prompt])])
        return _with_sizes(given, subject, size), pipe.guidance, f"conditioned on {prompt!r}"
    elif _encodes_prompts(pipe):
        states = pipe.encode_prompt(
            prompt=prompt, device=pipe.text_encoder.device, num_images_per_prompt=1, do_classifier_free_guidance=True
        )
        given = Condition(context=torch.cat([states[1], states[0]]))
        if len(states) == 4:
            given.text_embeds = torch.cat([states[3], states[2]])
        return _with_sizes(given, subject, size), GUIDANCE, f"conditioned on {prompt!r}"
    return random_condition(unet, subject, size, seed), GUIDANCE, "conditioned on random numbers, in place of a prompt"


def _reads_text(conditioner: Conditioner) -> bool:
    if not isinstance(conditioner, TextEncoder | TwoTextEncoders | TransformerText):
        return False
    tokenizers = getattr(conditioner, "tokenizers", [getattr(conditioner, "tokenizer", None)])
    return not any(isinstance(tokenizer, AbsentTokenizer) for tokenizer in tokenizers)


def _encodes_prompts(pipe: Any) -> bool:
    """Whether it is a Stable Diffusion pipeline of text alone, with its encoders and their tokenizers."""
    if type(pipe) not in (diffusers.StableDiffusionPipeline, diffusers.StableDiffusionXLPipeline):
        return False
    wanted = [n for n in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2") if n in pipe.components]
    parts = [pipe.components[name] for name in wanted]
    return all(part is not None and not isinstance(part, AbsentTokenizer) for part in parts)


def _with_sizes(given: Condition, subject: Subject, size: tuple[int, int]) -> Condition:
    if given.text_embeds is not None:
        height, width = (side * downsampling(subject.networks["vae"]) for side in size)
        given.time_ids = torch.tensor([[height, width, 0, 0, height, width]]).float().expand(len(given), -1)
    return given


def random_condition(unet: nn.Module, subject: Subject, size: tuple[int, int], seed: int) -> Condition:
    """What this U-Net must be given beside the latent, drawn for two pictures.

    Raises NotImplementedError for a U-Net that takes what this does not know how to draw.
    """
    config, draw = unet.config, _drawer(seed)
    found = Condition()
    width = config.get("encoder_hid_dim") or config.get("cross_attention_dim")
    if isinstance(width, list | tuple):
        width = width[0]
    if width:
        found.context = draw(2, TOKENS, width)
    beside = config.in_channels - latent_channels(subject)
    if beside > 0:
        found.concat = draw(2, beside, *size)
    if config.get("num_class_embeds") or config.get("class_embed_type") in ("timestep", "identity"):
        found.label = torch.tensor([0, 1])
    elif config.get("class_embed_type"):
        found.label = draw(2, config.projection_class_embeddings_input_dim)
    added = config.get("addition_embed_type")
    if added == "text_time":
        ids = torch.tensor([[512.0, 512, 0, 0, 512, 512]]).expand(2, -1)
        pooled = config.projection_class_embeddings_input_dim - ids.shape[1] * config.addition_time_embed_dim
        found.text_embeds, found.time_ids = draw(2, pooled), ids
    elif added not in (None, "text"):
        raise NotImplementedError(f"verify cannot draw what a U-Net with addition_embed_type={added!r} takes")
    return found


def latent_channels(subject: Subject) -> int:
    vae, unet = subject.networks.get("vae"), subject.networks.get("unet")
    return unet.config.out_channels if vae is None else vae.config.latent_channels


def _drawer(seed: int) -> Callable[..., torch.Tensor]:
    generator = torch.Generator().manual_seed(seed + 1)
    return lambda *shape: torch.randn(*shape, generator=generator)


def waves(size: tuple[int, int], seed: int) -> torch.Tensor:
    """[1, 3, H, W] in [-1, 1]: waves of three directions under a little noise."""
    y, x = torch.meshgrid(torch.linspace(0, 9, size[0]), torch.linspace(0, 9, size[1]), indexing="ij")
    waves = torch.stack([torch.sin(x), torch.cos(y), torch.sin(x + y)])[None]
    return (0.8 * waves + 0.1 * _drawer(seed)(1, 3, *size)).clamp(-1, 1)


def fresh(scheduler: diffusers.SchedulerMixin, *, stock: bool) -> diffusers.SchedulerMixin:
    """A copy in its first state: stock's class, or ours where there is one."""
    kind = getattr(type(scheduler), "stock", type(scheduler))
    made = kind.from_config(as_it_is(scheduler))
    return made if stock else catalogue.take_over(made) or made
