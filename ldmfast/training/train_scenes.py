"""Stage 2 on composed scenes: one denoiser conditioned on boxes or a semantic map, its encoders trained jointly.

Every sample of a batch has a condition of one kind, so that both kinds share what they learn of the objects. A class
alone becomes one of the boxes that it has in the collection (`PlacedClass`): as a condition of its own, as a label, a
token or a vector beside the latent, its objects were still mosaics of the right colours when boxes held theirs.
"""

from pathlib import Path

import torch

from ldmfast.conditioning import Hybrid
from ldmfast.conditioning.classes_and_boxes import BoxEncoder, PlacedClass
from ldmfast.conditioning.spatial import MapEncoder
from ldmfast.data import scenes
from ldmfast.data.collection import CACHE, load_pictures
from ldmfast.models.encode_decode import downsampling
from ldmfast.pipeline import saved_autoencoder
from ldmfast.training import train_denoiser

LAYOUTS = 16  # boxes of a class that are kept to choose from


def conditioner(config, side, f, rows):
    """Boxes as three tokens and filled in beside the latent, with its coordinates; the map's channels beside the
    latent; a class as one of the boxes that it has in `rows`.

    side  of the latent
    f     pixels of a picture to one of its latent, along a side
    """
    torch.manual_seed(config.seed)
    channels, halvings = config.map_channels, f.bit_length() - 1
    return Hybrid(
        **{
            "class": PlacedClass(class_boxes(rows)),
            "boxes": BoxEncoder(list(scenes.OBJECTS), config.width, objects=3, grid=side, paint=channels),
            "map": MapEncoder(list(scenes.CLASSES), channels, stages=halvings, palette=scenes.palette()),
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


def inputs(row, folder):
    """The conditions that a scene offers, one kind each; the first is taken most."""
    return [{"boxes": row["objects"]}, {"map": scenes.read_map(Path(folder, row["map"]))}]


def train(data, autoencoder, folder, config, *, restart=False, quiet=False):
    """Train on the scenes in `data`, write checkpoints and the finished pipeline to `folder`. Returns the losses."""
    vae = saved_autoencoder.load(autoencoder)
    f = downsampling(vae)
    pictures = load_pictures(
        data, vae.config.sample_size, split="train", skip_broken=config.skip_broken, cache=Path(folder, CACHE)
    )
    for row in pictures.rows:
        if absent := [key for key in ("objects", "map") if key not in row]:
            raise ValueError(f"{data}: {row['file_name']} has no {absent[0]}; `ldmfast data scenes` makes scenes")
    return train_denoiser.train_on(
        pictures,
        vae,
        folder,
        config,
        conditioner=conditioner(config, vae.config.sample_size // f, f, pictures.rows),
        describe=lambda row: inputs(row, data),
        restart=restart,
        quiet=quiet,
    )
