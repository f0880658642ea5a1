"""What a model says of itself without its weights: the configurations in its folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ldmfast import files, shipped


@dataclass(frozen=True)
class Described:
    """The sizes that a model draws at.

    trained    (width, height) in pixels that it was trained at
    factor     pixels of a picture to one of its latents, along a side
    channels   of the autoencoder at full resolution, which is where most of the memory goes
    """

    trained: tuple[int, int]
    factor: int
    channels: int

    @classmethod
    def of_configs(cls, unet: dict, vae: dict) -> Described:
        """From the two configurations, as their JSON or as live ones. KeyError or TypeError if they are others'."""
        side, blocks = unet["sample_size"], vae["block_out_channels"]
        height, width = (side, side) if isinstance(side, int) else side
        factor = 2 ** (len(blocks) - 1)
        return cls((int(width) * factor, int(height) * factor), factor, int(blocks[0]))


def folder_of(model) -> Path | None:
    """The folder that --model names, or else that of the text model that ships; None for a file, or nothing there."""
    folder = shipped.locate(model)
    return folder if folder.is_dir() else None


def described(model) -> Described | None:
    """Of a folder; None for a file, and for what is no model, which loading it will say."""
    folder = folder_of(model)
    try:
        parts = [files.read_json(folder / name / "config.json") for name in ("unet", "vae")] if folder else None
        return Described.of_configs(*parts) if parts else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def conditioners(model) -> dict[str, dict]:
    """{name: settings} of the conditioners in the folder of a model, a hybrid's members by their names."""
    folder = folder_of(model)
    home = folder / "conditioner" if folder else None
    if home is None or not (home / "config.json").is_file():
        return {}
    settings = files.read_json(home / "config.json")
    members = settings.get("members")
    if not members:
        return {settings.get("_class_name", ""): settings}
    return {name: files.read_json(home / name / "config.json") for name in members}


def named(model) -> dict[str, list | dict]:
    """{"class" | "boxes": names, "map": {name: colour}} of a folder's conditioners that take what has names."""
    found = {}
    options = {"PlacedClass": "class", "ClassEmbedder": "class", "BoxEncoder": "boxes", "LayoutEncoder": "boxes"}
    for settings in conditioners(model).values():
        kind = settings.get("_class_name")
        names = list(settings["boxes"]) if kind == "PlacedClass" else settings.get("classes")
        if kind == "MapEncoder" and settings.get("palette") and isinstance(names, list):
            found["map"] = dict(zip(names, settings["palette"], strict=True))
        elif kind in options and isinstance(names, list):
            found[options[kind]] = names
    return found
