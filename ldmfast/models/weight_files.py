"""What a checkpoint is, read from its first bytes, so that a wrong one is refused in one line.

Only headers are read: a safetensors file begins with the length of a JSON table of names, dtypes and shapes.
"""

from __future__ import annotations

import json
import operator
import re
import struct
import zipfile
from collections.abc import Iterable
from pathlib import Path

from ldmfast.files import read_json

WIDTHS = {768: "SD1.x", 1024: "SD2.x", 1280: "SDXL's refiner", 2048: "SDXL"}  # of the prompt, by family
_KINDS = (  # a name in the table, and what a file with it is
    ("model.diffusion_model.", "a single-file checkpoint; load it with from_single_file"),
    ("lora", "a LoRA; load the base model, then pipe.load_lora_weights"),
    ("controlnet_cond_embedding", "a ControlNet; load it with diffusers' ControlNetModel"),
    ("transformer_blocks.0.attn.", "a transformer (SD3 or Flux), not a U-Net"),
    ("joint_blocks.0.", "a transformer (SD3), not a U-Net"),
    ("double_blocks.0.", "a transformer (Flux), not a U-Net"),
    ("text_model.", "a text encoder; load it with transformers"),
    ("quantize.embedding.weight", "an autoencoder with a codebook; use VQModel"),
    ("decoder.up_blocks.", "an autoencoder; use AutoencoderKL"),
    ("down_blocks.0.resnets.0.time_emb_proj", "a U-Net; use UNet"),
)
_FIRST = {
    "UNet2DConditionModel": "conv_in.weight",
    "AutoencoderKL": "encoder.conv_in.weight",
    "VQModel": "quantize.embedding.weight",
}
_DIMENSIONS = (  # entries of a config.json that are dimensions of weights as they stand
    "block_out_channels conv_in_kernel conv_out_kernel cross_attention_dim encoder_hid_dim in_channels latent_channels "
    "num_class_embeds num_vq_embeddings out_channels time_embedding_dim vq_embed_dim"
).split()
_ANY = 1 << 16  # so large an entry may be without use: cross_attention_dim is written where nothing attends


def shapes(path: str | Path) -> dict[str, tuple[int, ...]]:
    """{name: shape} of a safetensors file, from its header alone. Raises ValueError saying what else the file is."""
    path = Path(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(64)
        if problem := _not_safetensors(start):
            raise ValueError(f"{path}: {problem}")
        length = struct.unpack("<Q", start[:8])[0]
        if 8 + length > size:
            raise ValueError(f"{path}: truncated inside its header ({size} bytes); download it again")
        file.seek(8)
        try:
            table = json.loads(file.read(length))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: its header is not JSON, so it is no safetensors file") from error
    if not isinstance(table, dict):
        raise ValueError(f"{path}: its header is a {type(table).__name__}, so it is no safetensors file")
    table.pop("__metadata__", None)
    try:
        end = 8 + length + max((entry["data_offsets"][1] for entry in table.values()), default=0)
        found = {name: tuple(map(operator.index, entry["shape"])) for name, entry in table.items()}
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{path}: its header describes no tensors; download it again") from error
    if end > size:
        raise ValueError(f"{path}: truncated, {size} bytes of {end}; download it again")
    return found


def not_weights(start: bytes) -> str | None:
    """What a file of weights turns out to be, from its first bytes; None if it may be one."""
    if not start:
        return "is empty; download it again"
    text = start.lstrip().lower()
    if text.startswith((b"<html", b"<!doctype", b"<?xml")):
        return f"starts with `{text[:5].decode()}`: a failed download (a web page was saved in place of the file)"
    if text.startswith(b"version https://git-lfs"):
        return "is a git-lfs pointer, not the weights; run `git lfs pull`"
    return None


def _not_safetensors(start: bytes) -> str | None:
    if problem := not_weights(start):
        return problem
    if start.startswith((b"PK", b"\x80")) and start[8:9] != b"{":  # a table's length may begin with the same bytes
        return "is a pickle (.bin or .ckpt), not a safetensors file"
    return None if len(start) >= 8 else f"has only {len(start)} bytes; download it again"


def check_single_file(source: str | Path) -> None:
    """Refuse a local file that holds no weights, or not all of them. Raises ValueError in one sentence.

    What is no file is left to diffusers, which may find it on the hub.
    """
    path = Path(source)
    if not path.is_file():
        return
    with path.open("rb") as file:
        start = file.read(64)
    if problem := not_weights(start):
        raise ValueError(f"{path}: {problem}")
    if path.suffix == ".safetensors" or start[8:9] == b"{":
        shapes(path)
    elif start.startswith(b"PK") and not zipfile.is_zipfile(path):
        raise ValueError(f"{path}: truncated, a torch file without its end; download it again")
    elif not start.startswith((b"PK", b"\x80")):
        raise ValueError(f"{path}: neither a torch file nor a pickle nor safetensors (begins with {start[:8]!r})")


def kind(table: dict[str, tuple]) -> str:
    """What a table of names belongs to: the first entry of `_KINDS` that occurs in it."""
    for mark, meaning in _KINDS:
        if any(mark in name for name in table):
            return meaning
    return "nothing that ldmfast knows"


def prompt_width(table: dict[str, tuple]) -> int | None:
    """The width of the prompt that a U-Net's cross-attention takes, from its tables of shapes."""
    keys = (shape for name, shape in table.items() if name.endswith("attn2.to_k.weight"))
    return next((shape[1] for shape in keys if len(shape) == 2), None)


def check_folder(folder: Path, stock_name: str, variant: str | None = None) -> None:
    """Refuse a local folder that does not hold a `stock_name` with whole files of the family its config says.

    Raises ValueError with one sentence. A folder that is not there is left to diffusers, which asks the hub.
    """
    if not folder.is_dir():
        return
    if not (folder / "config.json").exists():
        if (folder / "model_index.json").exists():
            raise ValueError(f"{folder} is a whole pipeline: name the part, such as subfolder='unet' or 'vae'")
        return
    config = read_json(folder / "config.json")
    name = config.get("_class_name", stock_name)
    if name != stock_name:
        name = str(name)[:80]
        raise ValueError(f"{folder} holds a {name}, not a {stock_name}; load it with diffusers' {name}")
    tables = {file: shapes(file) for file in sorted(_weights(folder, variant))}
    together = {name: shape for table in tables.values() for name, shape in table.items()}
    if together:
        _check_sizes(folder, config, together)
        _check_family(folder, stock_name, config, together)


def _weights(folder: Path, variant: str | None) -> list[Path]:
    """The safetensors files of one variant's weights, whole or in shards; those of others may be what they are."""
    shard = r"(-\d+-of-\d+)?"
    named = "" if variant is None else rf"\.{re.escape(variant)}"
    name = re.compile(rf"diffusion_pytorch_model({named}{shard}|{shard}{named})\.safetensors")
    return [path for path in folder.glob("diffusion_pytorch_model*.safetensors") if name.fullmatch(path.name)]


def _check_sizes(folder: Path, config: dict, table: dict[str, tuple]) -> None:
    """No layer that none of these weights could fill, before there is one: it would take memory without bound."""
    largest = max((size for shape in table.values() for size in shape), default=0)
    for name in _DIMENSIONS:
        value = config.get(name)
        for size in value if isinstance(value, list) else [value]:
            if isinstance(size, int) and size > max(largest, _ANY):
                raise ValueError(
                    f"{folder}: its config.json has {size} in {name}, and no weight is larger than {largest} a side; "
                    "take both from one model"
                )


def _check_family(folder: Path, stock_name: str, config: dict, table: dict[str, tuple]) -> None:
    if _FIRST.get(stock_name, "") not in {"", *table}:
        raise ValueError(f"{folder}: its weights are {kind(table)}; expected a {stock_name}")
    width, wanted = prompt_width(table), config.get("cross_attention_dim")
    if width is None or not isinstance(wanted, int) or width == wanted:
        return
    family, other = (f" ({WIDTHS[w]})" if w in WIDTHS else "" for w in (width, wanted))
    raise ValueError(
        f"{folder}: its weights take prompts of width {width}{family}, its config.json says {wanted}{other}; "
        "take both from one model"
    )


def check_loaded(model_name: str, source: str | Path, info: dict, allowed: Iterable[str] = ()) -> None:
    """Refuse a model with weights that its checkpoint did not have. Raises ValueError naming the first of them.

    info     what diffusers says of the loading;   allowed  weights that may be random
    """
    mismatched = (entry[0] for entry in info.get("mismatched_keys", ()))
    missing = sorted({*info["missing_keys"], *mismatched}.difference(allowed))
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(
            f"{source} lacks {len(missing)} of this {model_name}'s weights: {', '.join(missing[:3])}{more}; "
            "they would be random. allow_missing=True takes them so"
        )
