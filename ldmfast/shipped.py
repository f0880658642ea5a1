"""The models that come with ldmfast, by name."""

from __future__ import annotations

from pathlib import Path

ASSETS = Path(__file__).parent / "assets"
TEXT = "emoji600"  # conditioned on a prompt
SCENES = "scenes64"  # conditioned on a class, boxes or a semantic map


def names() -> list[str]:
    """Of all that ship, sorted."""
    return sorted(path.name for path in ASSETS.iterdir() if (path / "unet").is_dir())


def locate(model: str | Path | None = None) -> Path:
    """The folder of `model`: a path, or else a shipped model's name; the text model by default."""
    path, shipped = Path(model or TEXT), ASSETS / str(model or TEXT)
    return shipped if not path.exists() and shipped.is_dir() else path
