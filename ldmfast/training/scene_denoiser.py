"""Stage 2 on composed scenes: one denoiser that is told a class, boxes or a semantic map, its encoders trained jointly.

A step tells each picture of its batch one kind of thing, so that the three share what they learn of the objects: a
scene of one object its class, its box or its map; a scene of several its boxes or its map.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ldmfast.models.conditioning import Hybrid
from ldmfast.models.conditioning_spatial import MapEncoder
from ldmfast.models.conditioning_tokens import BoxEncoder, ClassEmbedder
from ldmfast.training import denoiser, scenes


def conditioner(config, side, halvings):
    """The three encoders side by side: the class beside every place of the latent; boxes as three tokens and
    filled in beside the latent, with its coordinates; the map's channels beside the latent.

    side      of the latent
    halvings  of the first stage: 2 for f = 4
    """
    torch.manual_seed(config.seed)
    return Hybrid(**{
        "class": ClassEmbedder(list(scenes.OBJECTS), config.map_channels, mode="concat"),
        "boxes": BoxEncoder(list(scenes.OBJECTS), config.width, objects=3, grid=side, paint=config.map_channels),
        "map": MapEncoder(list(scenes.CLASSES), config.map_channels, stages=halvings, palette=scenes.palette()),
    })  # fmt: skip


def read_map(path):
    """A map that `scenes.write_map` wrote, as uint8 [H, W] of class indices."""
    with Image.open(path) as picture:
        return torch.from_numpy(np.array(picture))


def inputs(row, folder):
    """What a scene can be told, one kind each; the first is drawn most."""
    told = [{"boxes": row["objects"]}, {"map": read_map(Path(folder, row["map"]))}]
    return [{"class": row["objects"][0]["object"]}, *told] if len(row["objects"]) == 1 else told


def train(data, autoencoder, folder, config, *, restart=False, quiet=False):
    """Train on the scenes in `data`, write checkpoints and the finished pipeline to `folder`. Returns the losses."""
    vae = denoiser.load_autoencoder(autoencoder).config
    halvings = len(vae.block_out_channels) - 1
    return denoiser.train(
        data, autoencoder, folder, config, conditioner=conditioner(config, vae.sample_size >> halvings, halvings),
        describe=lambda row: inputs(row, data), restart=restart, quiet=quiet,
    )  # fmt: skip
