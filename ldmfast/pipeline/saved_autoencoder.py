"""The autoencoder in a folder that training or a pipeline wrote, or of a model that ships."""

from __future__ import annotations

from pathlib import Path

import diffusers
import torch

from ldmfast import files, shipped
from ldmfast.diffusion import catalogue
from ldmfast.models.autoencoder import AutoencoderKL
from ldmfast.models.vq import VQModel


def load(folder: str | Path) -> AutoencoderKL | VQModel:
    """The vae/ in `folder`, or of a shipped model by its name: float32, in inference mode.

    Raises FileNotFoundError naming the command that makes it, ValueError where vae/ holds another network.
    """
    home = shipped.locate(folder) / "vae"
    files.recover(home)
    if not (home / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no vae/; train it first: ldmfast train autoencoder --output {folder}")
    name = files.read_json(home / "config.json").get("_class_name")
    kind = catalogue.network(name)
    if not issubclass(kind, diffusers.AutoencoderKL | diffusers.VQModel):
        raise ValueError(f"{home} holds a {name}, not an autoencoder")
    return kind.from_pretrained(home, torch_dtype=torch.float32).eval()
