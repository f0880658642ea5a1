"""The models that come with ldmfast, by name."""

from __future__ import annotations

from pathlib import Path

ASSETS = Path(__file__).parent / "assets"
TEXT = "emoji320"  # conditioned on a prompt
SCENES = "scenes64"  # conditioned on a class, boxes or a semantic map


def names() -> list[str]:
    """Of all that ship, sorted."""
    return sorted(path.name for path in ASSETS.iterdir() if (path / "unet").is_dir())


def locate(model: str | Path | None = None) -> Path:
    """The folder of `model`: a path, or else a shipped model's name.

    None is the text model that ships, whatever stands under its name in the working directory.
    """
    if model is None:
        return ASSETS / TEXT
    path, shipped = Path(model), ASSETS / model
    return shipped if not path.exists() and shipped.is_dir() else path
