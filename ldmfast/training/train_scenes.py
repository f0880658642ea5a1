"""Stage 2 on composed scenes: one denoiser that is told boxes or a semantic map, its encoders trained jointly.

A step tells each picture of its batch one kind of thing, so that both share what they learn of the objects. A class
alone is told as one of the boxes that it has in the collection (`PlacedClass`): told by itself, as a label, a token or
a vector beside the latent, its objects were still mosaics of the right colours when boxes held theirs.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ldmfast.conditioning.classes_and_boxes import BoxEncoder, PlacedClass
from ldmfast.conditioning.hybrid import Hybrid
from ldmfast.conditioning.spatial import MapEncoder
from ldmfast.data import scenes
from ldmfast.data.collection import read_rows
from ldmfast.training import train_denoiser

LAYOUTS = 16  # boxes of a class that are kept to draw from


def conditioner(config, side, halvings, rows):
    """Boxes as three tokens and filled in beside the latent, with its coordinates; the map's channels beside the
    latent; a class as one of the boxes that it has in `rows`.

    side      of the latent
    halvings  of the first stage: 2 for f = 4
    """
    torch.manual_seed(config.seed)
    return Hybrid(
        **{
            "class": PlacedClass(class_boxes(rows)),
            "boxes": BoxEncoder(list(scenes.OBJECTS), config.width, objects=3, grid=side, paint=config.map_channels),
            "map": MapEncoder(list(scenes.CLASSES), config.map_channels, stages=halvings, palette=scenes.palette()),
        }
    )


def class_boxes(rows, most=LAYOUTS):
    """{object: at most `most` boxes} of the training scenes: of those that it has alone, or else of all. An object
    that they do not show is left out."""
    alone, any_ = ({name: [] for name in scenes.OBJECTS} for _ in range(2))
    for row in rows:
        for each in row["objects"] if row["split"] == "train" else ():
            any_[each["object"]].append(each["box"])
            if len(row["objects"]) == 1:
                alone[each["object"]].append(each["box"])
    found = {name: (alone[name] or any_[name])[:most] for name in scenes.OBJECTS}
    return {name: boxes for name, boxes in found.items() if boxes}


def read_map(path):
    """A map that `scenes.write_map` wrote, as uint8 [H, W] of class indices."""
    with Image.open(path) as picture:
        return torch.from_numpy(np.array(picture))


def inputs(row, folder):
    """What a scene can be told, one kind each; the first is drawn most."""
    return [{"boxes": row["objects"]}, {"map": read_map(Path(folder, row["map"]))}]


def train(data, autoencoder, folder, config, *, restart=False, quiet=False):
    """Train on the scenes in `data`, write checkpoints and the finished pipeline to `folder`. Returns the losses."""
    vae = train_denoiser.load_autoencoder(autoencoder).config
    halvings = len(vae.block_out_channels) - 1
    told = conditioner(config, vae.sample_size >> halvings, halvings, read_rows(data))
    return train_denoiser.train(
        data,
        autoencoder,
        folder,
        config,
        conditioner=told,
        describe=lambda row: inputs(row, data),
        restart=restart,
        quiet=quiet,
    )
