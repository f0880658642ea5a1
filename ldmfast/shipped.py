"""The models that come with ldmfast, by name."""

from pathlib import Path

ASSETS = Path(__file__).parent / "assets"
TEXT = "emoji600"  # told a prompt
SCENES = "scenes64"  # told a class, boxes or a semantic map


def names():
    """Of all that ship, sorted."""
    return sorted(path.name for path in ASSETS.iterdir() if (path / "unet").is_dir())


def locate(model=None):
    """The folder of `model`: a path, or else a shipped model's name; the text model by default."""
    path, shipped = Path(model or TEXT), ASSETS / str(model or TEXT)
    return shipped if not path.exists() and shipped.is_dir() else path
